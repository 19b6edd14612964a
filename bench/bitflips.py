"""Flip random single bits in the files of a checkpoint: every one must be found by verify, and none may be loaded.

    python -m bench.bitflips --flips 10000 [--seed 0]

Three checks per flip, on a small checkpoint with every kind of content: `verify` reports it; a load raises, or fills
the state with exactly the right bytes; reading each tensor raises or gives exactly the right bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.errors import CheckpointError


def state_of(filled: bool) -> dict[str, Any]:
    """Tensors of several dtypes and sizes around the granule's, values; zeros where not ``filled``."""
    scale = 1 if filled else 0
    state: dict[str, Any] = {
        "wide": (torch.arange(9_000, dtype=torch.int64) + 1) * scale,
        "tail": ((torch.arange(16_385) % 251) * scale).to(torch.uint8),
        "half": ((torch.arange(700) % 199) * scale).to(torch.bfloat16),
        "flag": torch.tensor(bool(scale)),
        "none": torch.empty(0, 4),
        "note": {"lr": 0.1 * scale, "name": "run" * scale},
    }
    return state


def wrong_leaves(state: dict[str, Any]) -> list[str]:
    wanted = state_of(True)
    return [
        name
        for name, value in wanted.items()
        if not (torch.equal(value, state[name]) if isinstance(value, torch.Tensor) else value == state[name])
    ]


class Flipper:
    """One checkpoint, one flipped bit at a time."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        ce.save(state_of(True), root, 1)
        self.files = sorted(path for path in (root / "step-000000001").iterdir())
        self.sizes = [path.stat().st_size for path in self.files]
        self._dice = random.Random(seed)

    def choose(self) -> tuple[Path, int]:
        """A file and a bit of it; half of the choices fall evenly on files, so that small ones get their share."""
        if self._dice.random() < 0.5:
            number = self._dice.randrange(len(self.files))
        else:
            number = self._dice.choices(range(len(self.files)), self.sizes)[0]
        return self.files[number], self._dice.randrange(8 * self.sizes[number])

    def flip(self, path: Path, bit: int) -> list[str]:
        """What went wrong with this bit flipped; an empty list when all is as it must be."""
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            (byte,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
        try:
            return self._check()
        finally:
            with open(path, "r+b") as file:
                file.seek(bit // 8)
                file.write(bytes([byte]))

    def _check(self) -> list[str]:
        problems = []
        try:
            with ce.open(self.root, 1) as checkpoint:
                checkpoint.verify()
            problems.append("verify did not find it")
        except CheckpointError:
            pass
        state = state_of(False)
        try:
            ce.load(state, self.root, 1)
            problems += [f"{name} was loaded wrong" for name in wrong_leaves(state)]
        except CheckpointError:
            pass
        with contextlib.suppress(CheckpointError):
            problems += self._read()
        return problems

    def _read(self) -> list[str]:
        wanted = state_of(True)
        problems = []
        with ce.open(self.root, 1) as checkpoint:
            for name in checkpoint.names():
                try:
                    found = checkpoint.read(name)
                    part = checkpoint.read(name, slice(3, 5)) if found.ndim else None
                except CheckpointError:
                    continue
                wrong_part = part is not None and not torch.equal(part, wanted[name][3:5])
                if wrong_part or not torch.equal(found, wanted[name]):
                    problems.append(f"{name} was read wrong")
        return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("ckptengine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as folder:
        flipper = Flipper(Path(folder) / "root", options.seed)
        by_file: Counter[str] = Counter()
        failures = []
        for _ in range(options.flips):
            path, bit = flipper.choose()
            by_file[path.name.partition("-")[0]] += 1
            problems = flipper.flip(path, bit)
            failures += [f"{path.name} bit {bit}: {problem}" for problem in problems]
    summary = {"flips": options.flips, "by_file": dict(by_file), "failures": len(failures), "first": failures[:10]}
    print(json.dumps(summary, indent=2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
