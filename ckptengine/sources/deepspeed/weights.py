"""The model files: weights, buffers, frozen and tied parameters, pipeline layers and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptengine.errors import NotFound, UnreadableFormat
from ckptengine.sources.deepspeed.autoep import Layers, joined_weights
from ckptengine.sources.deepspeed.folder import StepFolder
from ckptengine.sources.deepspeed.groups import sliced
from ckptengine.sources.deepspeed.header import ModelStates, load_dict, tensors_of
from ckptengine.sources.held import Held, Whole
from ckptengine.sources.stored import StoredTensor

TIED = "tied_modules."


@dataclass(slots=True)
class Weights:
    """What one pipeline stage of one tensor-parallel rank holds, by parameter name, and the aliases among them."""

    held: dict[str, Held] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, StoredTensor]) -> None:
        first: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            self.held[name] = Whole(tensor)
            if tensor.size and first.setdefault(tensor.identity, name) != name:
                self.aliases[name] = first[tensor.identity]

    def tie(self, shared: Mapping[str, str]) -> None:
        for alias, owner in shared.items():
            if owner in self.held and alias != owner:
                self.held[alias] = self.held[owner]
                self.aliases[alias] = owner
                self.aliases.pop(owner, None)


def module_weights(model: ModelStates) -> Weights:
    """ZeRO-0 to -2: the model file holds every parameter and buffer of its rank."""
    weights = Weights()
    weights.add(model.module)
    for name, tensor in model.frozen.items():
        weights.held.setdefault(name, Whole(tensor))
    weights.tie(model.shared)
    return weights


def stage3_weights(folder: StepFolder, mp: int, models: Sequence[ModelStates], masters: Mapping[str, Held]) -> Weights:
    """ZeRO-3: parameters are their masters, frozen ones lie in pieces on the ranks, buffers are whole."""
    weights = Weights(dict(masters))
    first = models[0]
    for name, shape in first.frozen_shapes.items():
        pieces = [model.frozen.get(name) for model in models]
        held = [piece for piece in pieces if piece is not None]
        if len(held) != len(models):
            raise NotFound(f"{folder.files.root}: some ranks' files lack their piece of the frozen parameter {name!r}")
        weights.held[name] = sliced(name, shape, held)
    weights.held |= {name: Whole(tensor) for name, tensor in first.module.items() if name in first.buffers}
    weights.tie(first.shared)
    weights.tie(_other_names(first, weights))
    for name, tensor in first.module.items():
        if name not in weights.held and tensor.size:
            weights.held[name] = Whole(tensor)
    return weights


def _other_names(model: ModelStates, weights: Weights) -> dict[str, str]:
    """Other names of parameters and buffers: the module holds the same tensor, or the same placeholder, under both.

    What a module that is used twice holds is not among the ``shared_params``.
    """
    owners: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in model.module.items():
        if name in weights.held and name not in weights.aliases:
            owners.setdefault(tensor.identity, []).append(name)
    found: dict[str, str] = {}
    for name, tensor in model.module.items():
        known = owners.get(tensor.identity, ())
        if name not in weights.held and len(known) == 1:
            found[name] = known[0]
    return found


def pipeline_weights(folder: StepFolder, tp: int, sizes: Mapping[str, int]) -> Weights:
    """Pipeline modules: one file per layer; ``sizes`` are trained parameters and their numbers of elements.

    The layer number is part of a parameter's name; a tied layer's parameters go by the name of their tie.
    """
    weights = Weights()
    numbers = sorted({layer for layer, rank in folder.layers if rank == tp})
    if not numbers:
        raise NotFound(f"{folder.files.root} has no layer_*-model_{tp:02d}-model_states.pt")
    ties = _ties(sizes)
    for number in numbers:
        tensors = tensors_of(load_dict(folder.files, folder.layers[number, tp]))
        prefix = str(number)
        if not any(f"{number}.{key}" in sizes for key in tensors):
            fitting = [tie for tie, parts in ties.items() if _fits(tensors, parts)]
            prefix = fitting[0] if len(fitting) == 1 and f"{fitting[0]}." not in _prefixes(weights) else prefix
        weights.add({f"{prefix}.{key}": tensor for key, tensor in tensors.items()})
    return weights


def _ties(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """``tied_modules.<key>`` -> the sizes of its parameters by their own names."""
    ties: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        if name.startswith(TIED) and name.count(".") > 1:
            key, _, own = name[len(TIED) :].partition(".")
            ties.setdefault(TIED + key, {})[own] = size
    return ties


def _fits(tensors: Mapping[str, StoredTensor], parts: Mapping[str, int]) -> bool:
    return all(key in tensors and tensors[key].size == size for key, size in parts.items())


def _prefixes(weights: Weights) -> set[str]:
    return {".".join(name.split(".")[:2]) + "." for name in weights.held if name.startswith(TIED)}


def expert_weights(folder: StepFolder, mp: int, layers: Layers | None = None) -> Weights:
    """Expert files: each holds one expert of one layer under its global number; those of AutoEP's ``layers`` joined."""
    weights = Weights()
    for layer, expert, rank in sorted(folder.experts):
        if rank == mp:
            for name, tensor in tensors_of(load_dict(folder.files, folder.experts[layer, expert, rank])).items():
                if name in weights.held:
                    raise UnreadableFormat(f"{folder.files.root}: two expert files hold {name!r}")
                weights.held[name] = Whole(tensor)
    return Weights(joined_weights(weights.held, layers)) if layers else weights
