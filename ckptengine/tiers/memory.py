"""Host memory as a tier: files on a memory file system, private to the user.

It outlives the process, so that a job that is restarted on the same node, or whoever drains what it left behind, finds
its newest checkpoint there; a power cut takes it, so nothing here is ever called committed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from ckptengine.errors import StorageFailed, UnusableRequest
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.port import check_name
from ckptengine.tiers.refusals import refusals

SHARED_MEMORY = Path("/dev/shm")


class MemoryTier(LocalTier):
    """Objects as files with mode 0600 under ``<base>/ckptengine-<user id>/<name>``, directories with mode 0700.

    ``name`` separates jobs of one user on one node; the same name finds the same objects again.  ``base`` is a mounted
    memory file system.  A directory of that name that belongs to somebody else, or that others may enter, is refused.
    """

    def __init__(self, name: str, *, base: Path = SHARED_MEMORY, create: bool = True) -> None:
        if not base.is_dir():
            raise UnusableRequest(f"there is no memory file system at {base}; leave the memory tier out, or mount one")
        home = base / f"ckptengine-{os.getuid()}"
        if create:
            with refusals("create directory", str(home)):
                home.mkdir(mode=0o700, exist_ok=True)
        if home.exists() or home.is_symlink():
            _must_be_private(home)
        super().__init__(home / check_name(name), file_mode=0o600, directory_mode=0o700, create=create)
        self._abilities = replace(self._abilities, survives_power_cut=False)

    def _sync(self, fd: int) -> None:
        """Nothing to flush to: what is written is where it will stay."""


def _must_be_private(home: Path) -> None:
    found = os.lstat(home)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageFailed(
            f"{home} is not a directory private to this user (owner {found.st_uid}, mode {found.st_mode & 0o7777:o}); "
            f"whoever made it could read or replace checkpoints; remove it"
        )
