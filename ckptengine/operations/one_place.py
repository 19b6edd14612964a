"""Whether all ranks write to one place: a root that is another directory on every host holds no whole checkpoint."""

from __future__ import annotations

import time

from ckptengine.errors import SaveFailed
from ckptengine.store import names
from ckptengine.store.manifest import Manifest
from ckptengine.store.root import Root

VISIBLE_S = 5.0
"""How long a file that another host has flushed may take to be seen here."""
_POLL_S = 0.1
_SHOWN = 8


def require_one_place(root: Root, manifest: Manifest) -> None:
    """See that every rank's file of a step about to be committed is beneath this rank's root, whole.

    Each file is asked for by name, as listings may be cached by network file systems.  Raises `SaveFailed` naming the
    ranks whose files are not there within `VISIBLE_S`: that step could never be restored.
    """
    deadline_s = time.monotonic() + VISIBLE_S
    missing = [rank for rank in range(manifest.world) if not _is_whole(root, manifest, rank)]
    while missing and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        missing = [rank for rank in missing if not _is_whole(root, manifest, rank)]
    if missing:
        raise SaveFailed(
            f"{root.path}: step {manifest.step} is not committed, because the files of ranks {missing[:_SHOWN]} are "
            "not there: the root is not one directory for all ranks. Give every rank the same root on a file system "
            "that all hosts share, or a URL, and node-local disks as tiers in front of it"
        )


def _is_whole(root: Root, manifest: Manifest, rank: int) -> bool:
    path = root.step_path(manifest.step) / names.rank_file(rank, manifest.attempt, manifest.save)
    try:
        return path.stat().st_size == manifest.files[rank].nbytes
    except OSError:
        return False
