"""Real checkpoints at rest, made by hand: rank files with an index, and a manifest; and ranks in threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptengine import native
from ckptengine.errors import RankTimeout
from ckptengine.layout import layout_json
from ckptengine.layout.digest import GRANULE_BYTES, raw_to_standard
from ckptengine.layout.sharding import replicated
from ckptengine.operations.draining.commit import Named
from ckptengine.operations.draining.transfer import DrainFile
from ckptengine.operations.levels.level import Landed
from ckptengine.plan.write import Owner
from ckptengine.store import names, rankfile
from ckptengine.store.manifest import FileRecord, Manifest, TensorRecord


@dataclass(frozen=True)
class Step:
    """What `write_step` made."""

    step: int
    manifest: Manifest
    names: tuple[str, ...]

    def drain_file(self, rank: int = 0, digest: str | None = None) -> DrainFile:
        return DrainFile(self.names[rank], self.manifest.files[rank].nbytes, digest)

    @property
    def named(self) -> Named:
        return Named(f"{names.step_dir(self.step)}/{self.manifest.file}", self.manifest.encode())


def write_step(
    root: Path,
    step: int,
    *,
    world: int = 1,
    extents: tuple[int, ...] = (100_000, 3, 0, 2_000_000),
    attempt: int = 1,
    save: int = 1,
) -> Step:
    """A step of ``world`` ranks beneath ``root``, each with tensors of these many bytes, committed."""
    folder = root / names.step_dir(step)
    folder.mkdir(parents=True)
    records, files = [], []
    for rank in range(world):
        name = names.rank_file(rank, attempt, save)
        identity = rankfile.FileIdentity(run="r", attempt=attempt, save=save, step=step, rank=rank, world=world)
        offsets, end = rankfile.place(extents, [0] * len(extents))
        body = bytearray(end)
        body[: rankfile.HEADER_BYTES] = rankfile.encode_header(identity)
        index = np.zeros(len(extents), rankfile.INDEX_DTYPE)
        granules = []
        for i, (offset, nbytes) in enumerate(zip(offsets, extents, strict=True)):
            data = np.random.default_rng([step, rank, i]).integers(0, 256, nbytes, np.uint8).tobytes()
            body[offset : offset + nbytes] = data
            granules.append(native.raw_granules(data, GRANULE_BYTES))
            index[i] = (i, 0, offset, nbytes, raw_to_standard(native.raw_crc64(data), nbytes))
        table, tail = rankfile.encode_tail(end, index, np.concatenate([np.zeros(0, np.uint64), *granules]), {})
        (folder / name).write_bytes(bytes(body) + table + tail)
        records.append(FileRecord(len(body) + len(table) + len(tail), native.crc64(tail)))
        files.append(f"{names.step_dir(step)}/{name}")
    manifest = Manifest(
        run="r",
        attempt=attempt,
        save=save,
        step=step,
        world=world,
        created="2000-01-01T00:00:00+00:00",
        writer="test",
        layouts=[layout_json.to_json(replicated(range(world)))],
        tensors=[TensorRecord(f"t{i:03d}", "uint8", (n,), 0, Owner(0), 0) for i, n in enumerate(extents)],
        files=records,
    )
    (folder / manifest.file).write_bytes(manifest.encode())
    return Step(step, manifest, tuple(files))


class Threads:
    """A coordinator of ranks that are threads of one process."""

    def __init__(self, rank: int, world: int, shared: dict[str, bytes]) -> None:
        self.rank, self.world, self._shared = rank, world, shared

    def put(self, key: str, data: bytes) -> None:
        assert key not in self._shared, "keys are used once"
        self._shared[key] = data

    def get(self, key: str, timeout_s: float) -> bytes:
        deadline_s = time.monotonic() + timeout_s
        while key not in self._shared:
            if time.monotonic() > deadline_s:
                raise RankTimeout(f"nobody told {key} within {timeout_s} s")
            time.sleep(0.002)
        return self._shared[key]

    def delete(self, key: str) -> None:
        self._shared.pop(key, None)

    def close(self) -> None:
        return None


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ckptengine")]


def landed_of(step: Step, rank: int = 0, *, all_the_way: bool = False) -> Landed:
    """What rank ``rank`` tells its levels of a step that it wrote where saves land."""
    manifest = step.manifest
    return Landed(
        step=step.step,
        attempt=manifest.attempt,
        save=manifest.save,
        files={rank: manifest.files[rank]},
        manifest=manifest.encode() if rank == 0 else None,
        all_the_way=all_the_way,
    )
