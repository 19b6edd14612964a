"""Parameters in the flat buffers of ZeRO: in which order and where each lies, and what a rank's part consists of.

ZeRO-1 and -2 lay the parameters of a group one after another and cut the whole evenly.  ``round_robin_gradients`` deals
them out to the ranks first, ``parameter_alignment`` lets each begin at a multiple of 16 bytes.  A job finds its states
only where its own configuration has both as they were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.deepspeed.classes import fragment_address
from ckptengine.sources.deepspeed.groups import dealt
from ckptengine.sources.deepspeed.training import Trained, Training
from ckptengine.sources.torchrecords import Run
from ckptengine.sources.writer import Job

ALIGNED_BYTES = 16
ROUND_ROBIN, ALIGNED = "round_robin_gradients", "parameter_alignment"


@dataclass(frozen=True, slots=True)
class FlatOrder:
    """How a job arranges its groups: dealt out to the ranks or not, each parameter at a multiple of ``alignment``."""

    round_robin: bool = False
    alignment: int = 1


def flat_order(job: Job, training: Training, stage: int, precision: str) -> FlatOrder:
    """What the options say, else the source's DeepSpeed configuration; only ZeRO-1 and -2 have a choice."""
    if stage not in (1, 2):
        return FlatOrder()
    config = training.values.get("ds_config")
    config = config if isinstance(config, dict) else {}
    chosen = _zero_of(config) if not _has_bf16_optimizer(config, stage, precision) else {}
    flags: dict[str, bool] = {}
    for key in (ROUND_ROBIN, ALIGNED):
        asked = job.options.get(key, chosen.get(key, False))
        if not isinstance(asked, bool):
            raise UnusableRequest(f"option {key} = {asked!r} is neither true nor false")
        flags[key] = asked
    return FlatOrder(flags[ROUND_ROBIN], ALIGNED_BYTES // itemsize(precision) if flags[ALIGNED] else 1)


def config_as_written(config: object, order: FlatOrder) -> object:
    """The source's DeepSpeed configuration, saying of the arrangement what is true of the target."""
    if not isinstance(config, dict) or not (_zero_of(config) or order != FlatOrder()):
        return config
    said = {ROUND_ROBIN: order.round_robin, ALIGNED: order.alignment > 1}
    zero = _zero_of(config)
    changed = {key: value for key, value in said.items() if zero.get(key, False) != value}
    return {**config, "zero_optimization": {**zero, **changed}} if changed else config


def _zero_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = config.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}


def _has_bf16_optimizer(config: Mapping[str, Any], stage: int, precision: str) -> bool:
    """Whether the job's optimizer is DeepSpeed's ``BF16_Optimizer``, which knows neither arrangement."""
    types = config.get("data_types")
    gradients = types.get("grad_accum_dtype") if isinstance(types, dict) else None
    offloaded = _zero_of(config).get("offload_optimizer")
    return stage == 1 and precision == "bfloat16" and gradients == "fp32" and not offloaded


@dataclass(frozen=True, slots=True)
class Arranged:
    """The parameters of a flat group in their order there, and how many zeros follow each."""

    members: tuple[Trained, ...]
    gaps: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members) + sum(self.gaps)

    def runs(self, start: int, stop: int, key: str) -> list[Run]:
        """What elements ``start:stop`` of the buffer of state ``key`` (empty: of the masters) consist of."""
        found: list[Run] = []
        position = 0
        for member, gap in zip(self.members, self.gaps, strict=True):
            end = position + member.size
            first, last = max(start, position), min(stop, end)
            if first < last:
                found.append(Run(tensor_of(member, key), first - position, last - position))
            zeros = min(stop, end + gap) - max(start, end)
            if zeros > 0:
                found.append(Run("", 0, zeros))
            position = end + gap
        return found

    def mapping(self, start: int, stop: int) -> dict[str, Any]:
        """Where each parameter lies in a rank's partition, for those that do."""
        made: dict[str, Any] = {}
        position = 0
        for member, gap in zip(self.members, self.gaps, strict=True):
            first, last = max(start, position), min(stop, position + member.size)
            if first < last:
                made[member.name] = fragment_address(first - start, last - first)
            position += member.size + gap
        return made


def arranged(members: Sequence[Trained], ranks: int, order: FlatOrder) -> Arranged:
    """The parameters of a group as a job on ``ranks`` ranks lays them."""
    held = tuple(dealt(members, ranks) if order.round_robin else members)
    gaps: list[int] = []
    position = 0
    for number, member in enumerate(held):
        position += member.size
        gaps.append(0 if number == len(held) - 1 else -position % order.alignment)
        position += gaps[-1]
    return Arranged(held, tuple(gaps))


def sliced(members: Sequence[Trained], rank: int, ranks: int, key: str) -> list[Run]:
    """ZeRO-3: a rank's piece of every parameter, each filled up with zeros to the common length."""
    runs: list[Run] = []
    for member in members:
        piece = -(-member.size // ranks)
        start, stop = min(rank * piece, member.size), min((rank + 1) * piece, member.size)
        runs += [Run(tensor_of(member, key), start, stop), Run("", 0, piece - (stop - start))]
    return runs


def tensor_of(member: Trained, key: str) -> str:
    """The tensor that is written as a state, or as the master where ``key`` is empty."""
    return member.states[key] if key else member.master
