"""DeepSpeed checkpoints as a source.

Weights are ``model.<name>``, fp32 masters ``optim.<name>.master``, optimizer states ``optim.<name>.<state>``.  The
values are those of the model file, with the optimizer's parameter groups, by name, under ``optim.param_groups``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import NotFound, UnreadableFormat
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.deepspeed.autoep import autoep_layers, joined_states
from ckptengine.sources.deepspeed.expertopt import whole_optimizer
from ckptengine.sources.deepspeed.folder import StepFolder, check_ranks, read_folder
from ckptengine.sources.deepspeed.groups import MASTER, entries
from ckptengine.sources.deepspeed.header import ModelStates, read_model_states
from ckptengine.sources.deepspeed.plainopt import Pool, plain_rest
from ckptengine.sources.deepspeed.recorded import recorded_rules
from ckptengine.sources.deepspeed.stages import stage_layers
from ckptengine.sources.deepspeed.universal import read_universal
from ckptengine.sources.deepspeed.weights import (
    TIED,
    Weights,
    expert_weights,
    module_weights,
    pipeline_weights,
    stage3_weights,
)
from ckptengine.sources.deepspeed.zero import read_partitions
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Held, Whole
from ckptengine.sources.plain import plain, walk_tensors
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.rules.assemble import Assembler
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.language import Rules
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.stored import StoredTensor

_FOLDER_STEP = re.compile(r"\D*?(\d+)\D*")


@dataclass(slots=True)
class RankParts:
    """What the files of one tensor-parallel rank hold, over all pipeline stages: weights and optimizer states."""

    weights: dict[str, Held] = field(default_factory=dict)
    states: dict[tuple[str, str], Held] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def add_weights(self, weights: Weights) -> None:
        for name, held in weights.held.items():
            self.weights.setdefault(name, held)  # replicated over pipeline stages
        self.aliases |= weights.aliases

    def add_states(self, found: Iterable[tuple[str, str, Held]], where: str) -> None:
        """``where`` names the stage's files for what it holds as well as a stage before, though it is not tied."""
        for name, key, held in found:
            if (name, key) in self.states and not name.startswith(TIED):
                raise _held_again(where, f"{key} of {name}")
            self.states.setdefault((name, key), held)


def _held_again(where: str, what: str) -> UnreadableFormat:
    return UnreadableFormat(
        f"{where} holds {what!r} again, though the files say that it is another pipeline stage; files of another run "
        "lie between them"
    )


class DeepSpeedSource:
    """A step folder of DeepSpeed, its tensor-parallel pieces put together as the rules say.

    Tensors of the client state (what the user gave ``save_checkpoint`` besides) go by their path in it, the first
    rank's, like the rest of it among the values.
    """

    format = "deepspeed"

    def __init__(self, opening: Opening) -> None:
        base = opening.files
        self._inline = InlineFiles(base)
        self._averages = AveragedFiles(self._inline)
        self.files: Files = self._averages
        self.metrics: Mapping[str, float] = {}
        folder = read_folder(base)
        reader = _Reader(folder, self._inline)
        parts = reader.read()
        self.step = reader.step if reader.step is not None else opening.step
        self._values = reader.values()
        self._aliases = {f"model.{alias}": f"model.{name}" for alias, name in parts[0].aliases.items()}
        self._held = _by_name(parts)
        self._client = _client(reader.rest, self._held)
        names = list(dict.fromkeys(parameter for parameter, _ in self._held.values()))
        if opening.rules is not None:
            rules: Rules | None = load_rules(opening.rules)
        else:
            rules = recorded_rules(reader.rest, names, base.root) if len(parts) > 1 else None
        self._assembler = Assembler(rules, names, self._values, self._averages)
        if len(parts) > 1:
            for name in self._held:
                self.tensor(name)  # what no rule explains is refused now

    def names(self) -> Sequence[str]:
        return [*self._held, *self._client]

    def tensor(self, name: str) -> LogicalTensor:
        if name in self._client:
            client = self._client[name][1]
            return LogicalTensor(name, client.dtype, client.shape, [client.fragment()] if client.size else [])
        found = self._held.get(name)
        if found is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        parameter, ranks = found
        pieces = [held.placed() for held in ranks]
        if not pieces[0].shape:
            pieces = pieces[:1]  # counters are the same everywhere
        placed = self._assembler.whole(parameter, pieces)
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments)

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def path(self, name: str) -> tuple[object, ...] | None:
        """See `ckptengine.sources.port.KnowsPaths`; of the client state's tensors."""
        path = self._client[name][0] if name in self._client else ()
        return path if path and all(type(part) in (str, int) for part in path) else None

    def values(self) -> object:
        return self._values


class _Reader:
    """Reads the headers of every file that matters; no tensor bytes."""

    def __init__(self, folder: StepFolder, inline: InlineFiles) -> None:
        self._folder = folder
        self._inline = inline
        self._ranks = check_ranks(folder)
        self._models: dict[int, list[ModelStates]] = {}
        self._groups: list[dict[Any, Any]] = []
        self._rest: Mapping[Any, Any] = {}
        self.step: int | None = None

    def read(self) -> list[RankParts]:
        """What each tensor-parallel rank holds."""
        for mp in range(self._ranks):
            self._models[mp] = self._model_files(mp)
        first = self._models[0][0]
        steps = first.rest.get("global_steps")
        self.step = steps if type(steps) is int else None
        tp_degree = self._tp_degree(first)
        parts = [RankParts() for _ in range(tp_degree)]
        if self._folder.universal:
            self._universal(parts)
            return parts
        for mp in range(self._ranks):
            self._read_rank(mp, parts[mp % tp_degree], collect_groups=mp % tp_degree == 0)
        for tp, part in enumerate(parts):
            if self._folder.layers:
                sizes = {name: held.size for (name, key), held in part.states.items() if key == MASTER}
                for models in self._models.values():
                    for group in models[0].shapes or ():
                        sizes |= {name: math.prod(shape) for name, shape in group.items()}
                part.add_weights(pipeline_weights(self._folder, tp, sizes))
        return parts

    @property
    def rest(self) -> Mapping[Any, Any]:
        """What else the first model file holds."""
        return self._models[0][0].rest

    def values(self) -> object:
        """Plain values: the model file's, the optimizer's under ``optim``."""
        made = plain(dict(self._models[0][0].rest))
        values = made if isinstance(made, dict) else {}
        groups = plain(self._groups)
        optim = plain(dict(self._rest))
        if groups or optim:
            values["optim"] = {**(optim if isinstance(optim, dict) else {}), "param_groups": groups or []}
        return values

    def _model_files(self, mp: int) -> list[ModelStates]:
        folder = self._folder
        if mp in folder.model:
            return [read_model_states(folder.files, folder.model[mp])]
        count = 1 + max(dp for rank, dp in folder.model3 if rank == mp)
        paths = [folder.model3.get((mp, dp)) for dp in range(count)]
        first = paths[0]
        if first is None:
            raise NotFound(f"{folder.files.root} has no zero_pp_rank_0_mp_rank_{mp:02d}_model_states.pt")
        model = read_model_states(folder.files, first)
        if not model.frozen_shapes:
            return [model]  # the other ranks' files say nothing new
        missing = [dp for dp in range(model.dp_world_size or count) if folder.model3.get((mp, dp)) is None]
        if missing:
            raise NotFound(f"{folder.files.root} has no zero_pp_rank_{missing[0]}_mp_rank_{mp:02d}_model_states.pt")
        return [model, *(read_model_states(folder.files, path) for path in paths[1:] if path is not None)]

    def _tp_degree(self, model: ModelStates) -> int:
        """Tensor-parallel ranks among the model-parallel ones; the rest of them are pipeline stages."""
        degrees = model.rest.get("checkpoint_parallel_dimensions")
        if isinstance(degrees, dict) and type(degrees.get("tp_degree")) is int and degrees["tp_degree"] > 0:
            tp = int(degrees["tp_degree"])
        elif self._folder.layers:
            tp = 1 + max(rank for _, rank in self._folder.layers)
        else:
            tp = self._ranks
        if self._ranks % tp:
            raise UnreadableFormat(
                f"{self._folder.files.root}: {self._ranks} model-parallel ranks do not divide into tensor-parallel "
                f"groups of {tp}"
            )
        return tp

    def _read_rank(self, mp: int, part: RankParts, *, collect_groups: bool) -> None:
        folder, models = self._folder, self._models[mp]
        model = models[0]
        stage3 = mp not in folder.model
        has_optimizer = any(rank == mp for rank, _ in folder.optim)
        if stage3 and not has_optimizer:
            raise NotFound(f"{folder.files.root} has no optimizer files, which is where ZeRO-3 keeps all weights")
        found: list[tuple[str, str, Held]] = []
        groups: Sequence[dict[Any, Any]] = []
        if has_optimizer:
            partitions = read_partitions(folder, mp, model, lambda sizes: self._module(mp, sizes))
            held = entries(partitions.groups, self._inline)
            found, groups = joined_states(held, autoep_layers(model)), partitions.named_groups
            if mp == 0:
                self._rest = partitions.rest
        elif model.optimizer is not None:
            found, groups = whole_optimizer(folder, mp, model, self._inline, self._stage(mp))
            if mp == 0:
                self._rest = plain_rest(model)
        if collect_groups:
            self._merge_groups(groups)
        part.add_states(found, f"{folder.files.root}: mp_rank {mp:02d}")
        if stage3:
            masters = {name: held for name, key, held in found if key == MASTER}
            part.add_weights(stage3_weights(folder, mp, models, masters))
        else:
            weights = module_weights(models[0])
            twice = next((name for name in weights.held if name in part.weights), None)
            if twice is not None:
                raise _held_again(f"{folder.files.root}: mp_rank {mp:02d}", twice)
            part.add_weights(weights)
        part.add_weights(expert_weights(folder, mp, autoep_layers(model)))

    def _module(self, mp: int, sizes: Mapping[str, int]) -> Mapping[str, StoredTensor]:
        """The weights of a pipeline stage by the names that its optimizer uses; only their shapes are needed."""
        model = self._models[mp][0]
        if model.module or not self._folder.layers:
            return model.module
        held = pipeline_weights(self._folder, mp % self._tp_degree(model), sizes).held
        return {name: part.tensor for name, part in held.items() if isinstance(part, Whole)}

    def _stage(self, mp: int) -> tuple[Pool, int] | None:
        """The parameters of a pipeline stage, and how many the stages before it have; None without layer files."""
        if not self._folder.layers:
            return None
        tp_degree = self._tp_degree(self._models[mp][0])
        stages = [self._models[rank][0] for rank in range(mp % tp_degree, self._ranks, tp_degree)]
        return stage_layers(stages, pipeline_weights(self._folder, mp % tp_degree, {}))[mp // tp_degree]

    def _merge_groups(self, groups: Sequence[dict[Any, Any]]) -> None:
        """Pipeline stages have the same groups with other parameters."""
        for position, group in enumerate(groups):
            if position == len(self._groups):
                self._groups.append({**group, "params": []})
            held = self._groups[position]["params"]
            held += [name for name in group["params"] if name not in set(held)]

    def _universal(self, parts: list[RankParts]) -> None:
        first = self._models[0][0]
        universal = read_universal(self._folder, first, self._inline)
        self._groups, self._rest = universal.named_groups, universal.rest
        whole = RankParts()
        whole.add_states(universal.entries, self._folder.files.root)
        masters = {name: held for name, key, held in universal.entries if key == MASTER}
        if not self._folder.model:
            models = self._models[0]
            whole.add_weights(stage3_weights(self._folder, 0, models, masters))
        elif len(parts) == 1:
            whole.add_weights(module_weights(first))
            whole.add_weights(expert_weights(self._folder, 0, autoep_layers(first)))
            whole.add_weights(Weights(masters))  # what no model file was copied of
        else:  # the copied model files are cut, the masters are whole
            whole.weights |= masters
        parts[:] = [whole]


def _by_name(parts: Sequence[RankParts]) -> dict[str, tuple[str, tuple[Held, ...]]]:
    """Canonical name -> parameter, and what each tensor-parallel rank holds of it."""
    found: dict[str, tuple[str, tuple[Held, ...]]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.weights):
        found[f"model.{name}"] = (name, tuple(part.weights[name] for part in parts if name in part.weights))
    for name, key in dict.fromkeys(state for part in parts for state in part.states):
        held = tuple(part.states[name, key] for part in parts if (name, key) in part.states)
        found[f"optim.{name}.{key}"] = (name, held)
    return found


def _client(rest: Mapping[Any, Any], taken: Container[str]) -> dict[str, tuple[tuple[object, ...], StoredTensor]]:
    """The tensors of the client state and their paths, by name."""
    found = {}
    for path, tensor in walk_tensors(dict(rest)):
        name = ".".join(map(str, path))
        found[f"client.{name}" if name in taken else name] = path, tensor
    return found


def _probe(opening: Opening) -> bool:
    return opening.entry is None and read_folder(opening.files).is_checkpoint


def _open(opening: Opening) -> Source:
    return DeepSpeedSource(opening)


FORMAT = Format("deepspeed", _probe, _open)
