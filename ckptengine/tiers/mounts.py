"""What kind of file system a path lies on."""

from __future__ import annotations

import os
import re
from pathlib import Path

VOLATILE = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})
"""File systems whose content lives in memory and is lost with the power."""


def filesystem_of(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The type of the file system that holds ``path`` ("ext4", "tmpfs", ...), or None where it cannot be told."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    real = os.path.realpath(path)
    best: tuple[int, str] | None = None
    for line in lines:
        left, separator, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if not separator or len(fields) < 5 or not kinds:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        beneath = real == mount or real.startswith(mount.rstrip("/") + "/")
        # Later lines lie over earlier ones of the same mount point.
        if beneath and (best is None or len(mount) >= best[0]):
            best = (len(mount), kinds[0])
    return best[1] if best else None


def is_volatile(path: Path) -> bool:
    """Whether a power cut takes what is stored at ``path``; False where it cannot be told."""
    return filesystem_of(path) in VOLATILE
