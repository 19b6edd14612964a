"""Facts about the machine that a result is worth nothing without."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def _first(path: str, key: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        return ""
    return ""


def _file_system(folder: Path) -> dict[str, Any]:
    best = ("", "", "")
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        mounts = []
    target = str(folder.resolve())
    for line in mounts:
        device, point, kind, *_ = line.split()
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[1]):
            best = (device, point, kind)
    stat = os.statvfs(folder)
    return {"type": best[2], "device": Path(best[0]).name, "free_bytes": stat.f_bavail * stat.f_frsize}


def facts(folder: Path) -> dict[str, Any]:
    """Processor, memory, kernel, Python, torch, and the file system that `folder` is on."""
    memory_kib = _first("/proc/meminfo", "MemTotal").split()
    found: dict[str, Any] = {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory_kib[0]) * 1024 if memory_kib else 0,
        "virtual": "hypervisor" in _first("/proc/cpuinfo", "flags").split(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": _file_system(folder),
        "cuda_devices": len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    return found
