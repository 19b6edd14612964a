"""Whether all ranks write to one place: a root that is another one on every host holds no whole checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckptengine.errors import SaveFailed
from ckptengine.operations.draining.commit import Named
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.manifest import Manifest
from ckptengine.store.root import Root
from ckptengine.tiers.loop import BlockingTier

VISIBLE_S = 5.0
"""How long a file that another host has flushed may take to be seen here."""
_POLL_S = 0.1
_SHOWN = 8


def require_one_place(root: Root, manifest: Manifest) -> None:
    """See that every rank's file of a step about to be committed is beneath this rank's root, whole.

    Each file is asked for by name, as listings may be cached by network file systems.  Raises `SaveFailed` naming the
    ranks whose files are not there within `VISIBLE_S`: that step could never be restored.
    """
    remedy = (
        "the root is not one directory for all ranks. Give every rank the same root on a file system that all hosts "
        "share, or a URL, and node-local disks as tiers in front of it"
    )
    _require(str(root.path), manifest, lambda rank: _is_whole(root, manifest, rank), remedy)


class OnePlace:
    """The same of a root that files are carried to: looked at until one step was seen whole there."""

    def __init__(self, root: BlockingTier) -> None:
        self._root, self._proven = root, False

    def require(self, named: Named) -> None:
        """Right before the manifest ``named`` is put there.  Raises `SaveFailed` like `require_one_place`."""
        if self._proven:
            return
        manifest = manifests.decode(named.data, named.name)
        remedy = (
            "the root behind the tiers is not one place for all ranks, or somebody removed them. Give every rank the "
            "same root: a directory on a file system that all hosts share, or a URL that means the same everywhere; "
            "the step stays on the tier in front of it"
        )
        _require(self._root.label, manifest, lambda rank: self._has(manifest, rank), remedy)
        self._proven = True

    def _has(self, manifest: Manifest, rank: int) -> bool:
        name = f"{names.step_dir(manifest.step)}/{names.rank_file(rank, manifest.attempt, manifest.save)}"
        entry = self._root.stat(name)
        return entry is not None and entry.size_bytes == manifest.files[rank].nbytes


def _require(where: str, manifest: Manifest, is_whole: Callable[[int], bool], remedy: str) -> None:
    deadline_s = time.monotonic() + VISIBLE_S
    missing = [rank for rank in range(manifest.world) if not is_whole(rank)]
    while missing and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        missing = [rank for rank in missing if not is_whole(rank)]
    if missing:
        raise SaveFailed(
            f"{where}: step {manifest.step} is not committed, because the files of ranks {missing[:_SHOWN]} are "
            f"not there: {remedy}"
        )


def _is_whole(root: Root, manifest: Manifest, rank: int) -> bool:
    path = root.step_path(manifest.step) / names.rank_file(rank, manifest.attempt, manifest.save)
    try:
        return path.stat().st_size == manifest.files[rank].nbytes
    except OSError:
        return False
