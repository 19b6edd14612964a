"""Write the golden checkpoints of one format version.  Run once per version; what it wrote is never written again.

python -m tests.golden.make v1
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.store.files import FileOps

HERE = Path(__file__).parent
STEPS = (5, 10)


def state_of(step: int) -> dict[str, Any]:
    """Every element says where it is and of which step."""
    half = (torch.arange(600) * step % 1021).to(torch.bfloat16)
    return {
        "wide": torch.arange(3000, dtype=torch.int64).reshape(60, 50) + 1000 * step,
        "half": half,
        "tied": half,
        "flags": torch.arange(17) % step == 0,
        "scalar": torch.tensor(1.5 * step, dtype=torch.float64),
        "complex": torch.complex(torch.arange(4.0), torch.arange(4.0) * step),
        "empty": torch.empty(0, 2),
        "columns": (torch.arange(12, dtype=torch.int16).reshape(3, 4) + step).t(),
        "a.b": torch.tensor([step], dtype=torch.uint8),
        "values": {
            "step": step,
            "text": "ünïcode \n",
            "raw": b"\x00\xff",
            "none": None,
            "float": [0.1, float("inf"), -0.0],
            "ordered": OrderedDict(b=1, a=(2, 3)),
            "set": {1, 2},
            3: "an int key",
        },
    }


def main(version: str) -> None:
    root = HERE / version
    if root.exists():
        raise SystemExit(f"{root} is there: golden files are never written again")
    live = state_of(0x7F)
    with ce.Checkpointer(live, root, random=False, run=f"golden-{version}", file_ops=FileOps()) as checkpointer:
        for step in STEPS:
            for name, value in state_of(step).items():
                if isinstance(value, torch.Tensor):
                    live[name].copy_(value)
                else:
                    live[name] = value
            checkpointer.save(step, metrics={"loss": 1.0 / step}).result()
    (root / ".lock").unlink()
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    lines = [f"{path.relative_to(HERE)}={native.digest(path.read_bytes())}" for path in files]
    (HERE / f"{version}.digests").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
