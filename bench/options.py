"""What to measure: sizes, options, and the description of one job that is handed to a worker process."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, get_args

from ckptengine.errors import UnusableRequest

Size = Literal["tiny", "small", "real"]
SIZES: tuple[Size, ...] = get_args(Size)

WORKLOADS = ("disk", "stall", "durable", "memory", "restore", "reshard", "convert", "metadata", "many-small")
"""Every workload, in the order in which a run goes through them."""

DEFAULT_WORKLOADS = tuple(name for name in WORKLOADS if name != "convert")
"""What a bare `ckptengine bench` measures: `convert` has to let DeepSpeed write its source first, a minute each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizePreset:
    """The defaults that a size stands for."""

    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int
    steps: int
    every: tuple[int, ...]
    repetitions: int
    saves: int
    """Measured saves per process where nothing trains (durable, memory)."""
    tensors: int
    """Tensors in many-small."""
    simulated: tuple[int, int]
    """Ranks and tensors in metadata."""
    disk_bytes: int
    timeout_s: float
    time_limit_s: float | None = None
    """Of a whole run of default workloads and engines: the last repetition is what it cuts."""


PRESETS: dict[Size, SizePreset] = {
    "tiny": SizePreset(
        layers=1, width=64, vocabulary=256, context=16, batch=1, steps=5, every=(2,), repetitions=1, saves=1,
        tensors=200, simulated=(4, 8), disk_bytes=2 << 20, timeout_s=120.0,
    ),
    "small": SizePreset(
        layers=6, width=384, vocabulary=256, context=64, batch=2, steps=5, every=(1, 2, 10), repetitions=2, saves=3,
        tensors=2_000, simulated=(64, 1_000), disk_bytes=256 << 20, timeout_s=150.0,
        time_limit_s=1_140.0,
    ),
    "real": SizePreset(
        layers=12, width=768, vocabulary=50_304, context=256, batch=1, steps=12, every=(1, 2, 10), repetitions=3,
        saves=5, tensors=100_000, simulated=(1_024, 1_000), disk_bytes=1 << 30, timeout_s=1_800.0,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run of the benchmark, as asked for.

    `None` means: what the size stands for.  `threads` are torch compute threads, one set of jobs for each value.
    """

    size: Size = "small"
    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    engines: tuple[str, ...] | None = None
    state_bytes: int | None = None
    steps: int | None = None
    every: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    ranks: tuple[int, int] = (4, 2)
    repetitions: int | None = None
    saves: int | None = None
    tensors: int | None = None
    simulated: tuple[int, int] | None = None
    device: str = "cpu"
    directory: str | None = None
    time_limit_s: float | None = None
    """After this long no further job is started."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.workloads if name not in WORKLOADS]
        if unknown:
            raise UnusableRequest(f"no such workload: {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
        if self.size not in SIZES:
            raise UnusableRequest(f"no such size: {self.size}; there are {', '.join(SIZES)}")
        for name, value in (
            ("steps", self.steps),
            ("repetitions", self.repetitions),
            ("saves", self.saves),
            ("tensors", self.tensors),
        ):
            if value is not None and value < 1:
                raise UnusableRequest(f"--{name} must be at least 1, not {value}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise UnusableRequest(f"--time-limit must be above 0 minutes, not {self.time_limit_s / 60:g}")
        if self.state_bytes is not None and self.state_bytes < 1 << 16:
            raise UnusableRequest(f"--state-bytes must be at least 65536, not {self.state_bytes}")
        for name, values in (("every", self.every), ("threads", self.threads), ("ranks", self.ranks)):
            if values is not None and (not values or min(values) < 1):
                raise UnusableRequest(f"--{name} must be at least 1 each, not {','.join(map(str, values)) or 'empty'}")

    @property
    def preset(self) -> SizePreset:
        """The defaults of the size."""
        return PRESETS[self.size]

    @property
    def limit_s(self) -> float | None:
        """When no further job is started: as asked, or the size's own limit for a run of defaults."""
        defaults = Options(size=self.size, device=self.device, directory=self.directory)
        return self.preset.time_limit_s if self == defaults else self.time_limit_s

    def thread_counts(self) -> tuple[int, ...]:
        """Compute threads to measure with: given, or one core left to the engines."""
        return self.threads or (max(1, len(os.sched_getaffinity(0)) - 1),)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One workload with one engine in one process (or in `ranks` of them); travels as JSON."""

    workload: str
    engine: str
    size: Size
    repetition: int
    directory: str
    """Empty on start, on the file system that is measured, owned by this job or shared with its other phases."""
    threads: int
    steps: int
    every: tuple[int, ...]
    saves: int
    tensors: int
    simulated: tuple[int, int]
    disk_bytes: int
    timeout_s: float
    state_bytes: int | None = None
    device: str = "cpu"
    phase: str = ""
    """A workload may take several processes one after the other ("prepare", "restore")."""
    ranks: int = 1
    """Processes that save (reshard) ..."""
    target_ranks: int = 1
    """... and that restore."""
    seed: int = 1234

    def to_json(self) -> dict[str, Any]:
        """The job as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Job:
        """The inverse of `to_json`."""
        lists = {name: tuple(document[name]) for name in ("every", "simulated")}
        return cls(**{**document, **lists})


def job(options: Options, workload: str, engine: str, directory: str, **changes: Any) -> Job:
    """A job with the options' values, or the size's where none is given."""
    preset = options.preset
    fields: dict[str, Any] = {
        "workload": workload,
        "engine": engine,
        "size": options.size,
        "repetition": 0,
        "directory": directory,
        "threads": options.thread_counts()[0],
        "steps": options.steps or preset.steps,
        "every": options.every or preset.every,
        "saves": options.saves or preset.saves,
        "tensors": options.tensors or preset.tensors,
        "simulated": options.simulated or preset.simulated,
        "disk_bytes": preset.disk_bytes,
        "timeout_s": preset.timeout_s,
        "state_bytes": options.state_bytes,
        "device": options.device,
    }
    return Job(**{**fields, **changes})
