"""Megatron's legacy checkpoints: one folder per tensor-, pipeline- and expert-parallel rank.

What is cut over tensor-parallel ranks is put together as the rules say; layers and experts get their global numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Held
from ckptengine.sources.megatron.masters import SAMPLE
from ckptengine.sources.megatron.optimizer import Parameter, optimizer_states
from ckptengine.sources.megatron.rankfile import GRAD_SCALER, RankFile, read_rank_file
from ckptengine.sources.plain import plain
from ckptengine.sources.port import Files, Opening
from ckptengine.sources.rules.algebra import Placed
from ckptengine.sources.rules.assemble import Assembler
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.smalltensors import as_plain
from ckptengine.sources.stored import StoredTensor

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?/")
_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)|(.*\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)()")
_EXPERTS = ".experts."
_EMBEDDING = "word_embeddings.weight"
_OUTPUTS = ("output_layer.weight", "word_embeddings_for_head.weight")

Rank = tuple[int, int, int]
"""Tensor-, pipeline- and expert-parallel rank."""


@dataclass(slots=True)
class _Pieces:
    """What ranks hold of one tensor, by (expert-parallel, tensor-parallel) rank."""

    parameter: str
    held: dict[tuple[int, int], Held] = field(default_factory=dict)


class LegacySource:
    """All ranks of one iteration."""

    format = "megatron"

    def __init__(self, opening: Opening) -> None:
        base = opening.files
        self._inline = InlineFiles(base)
        self._averages = AveragedFiles(self._inline)
        self.files: Files = self._averages
        self.metrics: Mapping[str, float] = {}
        self._ranks = {rank: _read(base, folder) for rank, folder in _numbered(base).items()}
        first = self._ranks[0, 0, 0]
        self._check_iterations(first)
        self._expert_tp = _size(first.arguments, "expert_tensor")
        iteration = first.rest.get("iteration")
        self.step = iteration if type(iteration) is int else opening.step
        self._untied = first.arguments.get("untie_embeddings_and_output_weights")
        self._embeddings: dict[int, Parameter] = {}
        self._aliases: dict[str, str] = {}
        self._pieces: dict[str, _Pieces] = {}
        groups = self._collect()
        made = plain(dict(first.rest), lambda tensor: as_plain(tensor, self._inline))
        self._values: dict[Any, Any] = made if isinstance(made, dict) else {}
        if groups:
            self._values["optim"] = {"param_groups": plain(groups)}
        if first.grad_scaler is not None:
            scaler = plain(first.grad_scaler, lambda tensor: as_plain(tensor, self._inline))
            self._values["optimizer"] = {GRAD_SCALER: scaler}
        rules = load_rules(opening.rules) if opening.rules is not None else None
        names = list(dict.fromkeys(pieces.parameter for pieces in self._pieces.values()))
        self._assembler = Assembler(rules, names, self._values, self._averages)
        self._check_experts()
        if len(self._ranks) > 1:
            for name in self._pieces:
                self.tensor(name)  # what no rule explains is refused now

    def names(self) -> Sequence[str]:
        return [*self._pieces, *self._aliases]

    def tensor(self, name: str) -> LogicalTensor:
        pieces = self._pieces.get(self._aliases.get(name, name))
        if pieces is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        by_expert: list[Placed] = []
        for ep in sorted({ep for ep, _ in pieces.held}):
            placed = [held.placed() for (rank, _), held in sorted(pieces.held.items()) if rank == ep]
            by_expert.append(placed[0] if not placed[0].shape else self._assembler.whole(pieces.parameter, placed))
        if not by_expert[0].shape:
            whole = by_expert[0]
        else:
            whole = self._assembler.whole_experts(pieces.parameter, by_expert)
        return LogicalTensor(name, whole.dtype, whole.shape, whole.fragments)

    def aliases(self) -> Mapping[str, str]:
        """The output layer of a last pipeline stage that is tied to the embedding of the first."""
        return self._aliases

    def values(self) -> object:
        return self._values

    # reading

    def _check_iterations(self, first: RankFile) -> None:
        """`Damaged` where ranks were saved at different times."""
        for rank in self._ranks.values():
            here, there = rank.rest.get("iteration"), first.rest.get("iteration")
            if here != there:
                raise Damaged(f"{rank.path} is of iteration {here!r}, but {first.path} of iteration {there!r}")

    def _check_experts(self) -> None:
        """`NotFound` where experts are cut over more ranks than there are folders: Megatron-LM does not write those."""
        if self._expert_tp is None:
            return
        for name, pieces in self._pieces.items():
            lacking = set(range(self._expert_tp)) - {tp for _, tp in pieces.held}
            if lacking and _EXPERTS in pieces.parameter and len(next(iter(pieces.held.values())).placed().shape) > 1:
                raise NotFound(
                    f"{self.files.root}: {name} is cut over {self._expert_tp} expert-tensor-parallel ranks, and no "
                    f"folder holds the part of rank {min(lacking)}"
                )

    def _collect(self) -> list[dict[Any, Any]]:
        """Fill the pieces of every tensor; returns the optimizer's groups of the first ranks, by name."""
        first = self._first_layers()
        groups: list[dict[Any, Any]] = []
        for (tp, pp, ep), rank in self._ranks.items():
            parameters: list[Parameter] = []
            for number, chunk in enumerate(rank.chunks):
                layers = first[ep, pp, number]
                experts = _local_experts(chunk)
                for name, tensor in chunk.items():
                    shown = _global_name(name, layers, ep * experts)
                    parameters.append(Parameter(shown, name, number, tensor))
            copies = self._copies(tp, pp, parameters)
            for parameter in parameters:
                if parameter.name not in copies:
                    self._add(f"model.{parameter.name}", parameter.name, (ep, tp), parameter.whole())
            found, named = optimizer_states(rank, parameters, self._inline)
            for name, state, held in found:
                if name not in copies:
                    self._add(f"optim.{name}.{state}", name, (ep, tp), held)
            if tp == 0 or ep:
                _merge(groups, named, copies)
        return groups

    def _copies(self, tp: int, pp: int, parameters: Sequence[Parameter]) -> set[str]:
        """A later stage's output layer that is a copy of the first one's embedding; it becomes an alias."""
        for parameter in parameters if pp == 0 else ():
            if parameter.name.endswith(_EMBEDDING):
                self._embeddings[tp] = parameter
        owner = self._embeddings.get(tp)
        if owner is None or pp == 0 or self._untied is not False:
            return set()
        copies = {p.name for p in parameters if p.name.endswith(_OUTPUTS) and self._begin_alike(p.tensor, owner.tensor)}
        self._aliases |= {f"model.{name}": f"model.{owner.name}" for name in copies}
        return copies

    def _begin_alike(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two tensors are of one form and the first of their elements are the same, bit for bit."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        nbytes = min(one.nbytes, SAMPLE * itemsize(one.dtype))
        return self._inline.read(*one.at(), nbytes) == self._inline.read(*other.at(), nbytes)

    def _add(self, name: str, parameter: str, rank: tuple[int, int], held: Held) -> None:
        pieces = self._pieces.setdefault(name, _Pieces(parameter))
        ep, tp = rank
        if _EXPERTS in parameter and self._expert_tp is not None:
            tp %= self._expert_tp  # experts may be cut over fewer ranks than the rest
        if _EXPERTS not in parameter or _EXPERT.fullmatch(parameter):
            ep = 0  # the same on all expert-parallel ranks, or on one of them only
        pieces.held.setdefault((ep, tp), held)

    def _first_layers(self) -> dict[tuple[int, int, int], dict[str, int]]:
        """The global number of the first layer of each (expert-parallel rank, stage, chunk), by what they belong to.

        Layers go round the pipeline stages once for each virtual stage.
        """
        stages = 1 + max(pp for _, pp, _ in self._ranks)
        first: dict[tuple[int, int, int], dict[str, int]] = {}
        for ep in sorted({ep for _, _, ep in self._ranks}):
            tp = min(tp for tp, _, other in self._ranks if other == ep)
            chunks = {pp: self._ranks[tp, pp, ep].chunks for pp in range(stages)}
            if len({len(held) for held in chunks.values()}) > 1:
                raise UnreadableFormat(f"{self.files.root}: pipeline ranks have different numbers of virtual stages")
            known: Counter[str] = Counter()
            for number in range(len(chunks[0])):
                for pp in range(stages):
                    first[ep, pp, number] = dict(known)
                    known += _layer_counts(chunks[pp][number])
        return first


def rank_folders(files: Files) -> list[str]:
    """The folders of ranks in a folder of one iteration."""
    return [name for name in files.entries() if _RANK.fullmatch(name)]


def _numbered(files: Files) -> dict[Rank, str]:
    """Rank -> folder.  A second number is the pipeline's if the run had one, else the experts'."""
    found: dict[tuple[int, ...], str] = {}
    for folder in rank_folders(files):
        match = _RANK.fullmatch(folder)
        if match is not None:
            found[tuple(int(text) for text in match.groups() if text is not None)] = folder
    widths = {len(numbers) for numbers in found}
    if len(widths) > 1:
        raise UnreadableFormat(f"{files.root} mixes folders of runs with different parallelism")
    (width,) = widths
    arguments = _read(files, found[min(found)].rstrip("/")).arguments
    pipeline = width != 2 or _has_pipeline(arguments)
    ranks: dict[Rank, str] = {}
    for numbers, folder in found.items():
        tp, second, third = (*numbers, 0, 0)[:3]
        ranks[(tp, second, third) if pipeline else (tp, 0, second)] = folder
    axes = ("tensor_model", "pipeline_model", "expert_model")
    found_sizes = [1 + max(rank[axis] for rank in ranks) for axis in range(3)]
    tps, pps, eps = (max(_size(arguments, axis) or 1, n) for axis, n in zip(axes, found_sizes, strict=True))
    expert_tp = _size(arguments, "expert_tensor") or tps
    pairs = {(rank % tps, rank // expert_tp % eps) for rank in range(tps * eps * expert_tp)}
    wanted = [(tp, pp, ep) for tp in range(tps) for pp in range(pps) for ep in range(eps) if (tp, ep) in pairs]
    missing = [rank for rank in wanted if rank not in ranks]
    if missing:
        tp, pp, ep = missing[0]
        raise NotFound(
            f"{files.root} has no folder of tensor-parallel rank {tp}, pipeline rank {pp}, expert rank {ep}; "
            f"{len(missing)} of {len(wanted)} ranks are missing"
        )
    return {rank: ranks[rank].rstrip("/") for rank in wanted}


def _has_pipeline(arguments: Mapping[Any, Any]) -> bool:
    return (_size(arguments, "pipeline_model") or 1) > 1 or (_size(arguments, "expert_model") or 1) == 1


def _size(arguments: Mapping[Any, Any], axis: str) -> int | None:
    """The degree of a parallel axis as the arguments have it."""
    size = arguments.get(f"{axis}_parallel_size")
    return size if type(size) is int and size > 0 else None


def _read(files: Files, folder: str) -> RankFile:
    return read_rank_file(files, f"{folder}/{MODEL_FILE}", f"{folder}/{OPTIMIZER_FILE}")


def _layer_counts(chunk: Mapping[str, object]) -> Counter[str]:
    """How many layers an encoder, a decoder, ... has, by what their names begin with."""
    counts: Counter[str] = Counter()
    for name in chunk:
        if match := _LAYER.fullmatch(name):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    return counts


def _local_experts(chunk: Mapping[str, object]) -> int:
    numbers = [int(match[2] or match[5]) for name in chunk if (match := _EXPERT.fullmatch(name))]
    return 1 + max(numbers, default=-1)


def _global_name(name: str, first_layers: Mapping[str, int], first_expert: int) -> str:
    if match := _LAYER.fullmatch(name):
        name = f"{match[1]}{int(match[2]) + first_layers.get(match[1], 0)}{match[3]}"
    if match := _EXPERT.fullmatch(name):
        head, number, tail = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], match[6])
        name = f"{head}{int(number) + first_expert}{tail}"
    return name


def _merge(groups: list[dict[Any, Any]], named: Sequence[dict[Any, Any]], left_out: Container[str]) -> None:
    """Other ranks have the same groups with other parameters; a rank may lack one that has none of its parameters."""
    free = list(groups)
    for group in named:
        held = next((other for other in free if _settings(other) == _settings(group)), None)
        if held is None:
            groups.append(held := {**group, **({"params": []} if "params" in group else {})})
        else:
            free = [other for other in free if other is not held]
        if "params" in held and "params" in group:
            known = {*held["params"]}
            held["params"] += [name for name in group["params"] if name not in known and name not in left_out]
        else:
            held.pop("params", None)


def _settings(group: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in group.items() if key != "params"}
