"""Where saves land when what the user named can only be reached by carrying: host memory, else the temporary disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from pathlib import Path

from ckptengine.errors import UnusableRequest
from ckptengine.tiers.memory import SHARED_MEMORY
from ckptengine.tiers.spec import Tier

_FREE_BYTES = 1 << 30
"""Host memory that must be free for saves to land there unasked."""


def landing_for(root: Tier) -> Tier:
    """Host memory for this user and this root; a directory on the node's temporary disk where memory is scarce."""
    name = f"landing-{zlib.crc32(root.identity.encode()):08x}"
    try:
        if shutil.disk_usage(SHARED_MEMORY).free >= _FREE_BYTES:
            return Tier(f"shm://{name}")
    except OSError:  # none here
        pass
    home = Path(tempfile.gettempdir()) / f"ckptengine-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
    except OSError as refusal:
        raise UnusableRequest(
            f"{root.label} needs a directory to land in, and {home} cannot be used ({refusal.strerror}); "
            f"give one: tiers=[ckptengine.Tier(directory)]"
        ) from refusal
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UnusableRequest(f"{home} belongs to somebody else; give a directory: tiers=[ckptengine.Tier(directory)]")
    return Tier(home / name)
