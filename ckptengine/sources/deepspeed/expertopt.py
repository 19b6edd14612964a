"""The optimizer without ZeRO of one model-parallel rank: in its model file, or one file per expert-parallel rank."""

from __future__ import annotations

import re
from typing import Any

from ckptengine.errors import NotFound, UnreadableFormat
from ckptengine.sources.deepspeed.folder import StepFolder
from ckptengine.sources.deepspeed.fusedopt import any_optimizer
from ckptengine.sources.deepspeed.header import ModelStates, load_dict
from ckptengine.sources.deepspeed.plainopt import NAMELESS, Entries, Pool, Pools, pools_of
from ckptengine.sources.deepspeed.weights import expert_weights
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Whole
from ckptengine.sources.stored import StoredTensor

_NUMBER = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)\..*")


def whole_optimizer(
    folder: StepFolder, mp: int, model: ModelStates, inline: InlineFiles, layers: tuple[Pool, int] | None = None
) -> tuple[Entries, list[dict[Any, Any]]]:
    """(parameter, state, what is held) and the parameter groups with names, experts under their global numbers.

    ``layers`` has, for a pipeline stage, its parameters and how many the stages before it have.
    """
    files = {ep: path for (rank, ep), path in folder.expert_optim.items() if rank == mp}
    if not files and layers is not None:
        return any_optimizer(model.optimizer or {}, Pools(layers[0]), inline, layers[1])
    if not files:
        return any_optimizer(model.optimizer or {}, pools_of(model), inline)
    missing = sorted(set(range(max(files) + 1)) - set(files))
    if missing:
        raise NotFound(f"{folder.files.root} has no expp_rank_{missing[0]}_mp_rank_{mp:02d}_optim_states.pt")
    found: Entries = []
    groups: list[dict[Any, Any]] = []
    experts = _experts(folder, mp, len(files))
    for ep in range(len(files)):
        outer = load_dict(folder.files, files[ep]).get("optimizer")
        if not isinstance(outer, dict):
            raise UnreadableFormat(f"{folder.files.root}/{files[ep]} holds no optimizer")
        entries, named = any_optimizer(outer, pools_of(model, experts[ep]), inline)
        if ep == 0:
            found, groups = entries, named
            continue
        mine = {name for name, _ in experts[ep]}
        if any(name.startswith(f"{NAMELESS}.") for name, _, _ in entries):
            raise UnreadableFormat(
                f"{folder.files.root}/{files[ep]} keeps states by position, and the shapes do not tell which experts "
                "they belong to"
            )
        found += [entry for entry in entries if entry[0] in mine]
        for group, more in zip(groups, named, strict=False):
            group["params"] += [name for name in more["params"] if name in mine]
    return found, groups


def _experts(folder: StepFolder, mp: int, ranks: int) -> list[list[tuple[str, StoredTensor]]]:
    """The experts' weights of each expert-parallel rank, in the order of its module."""
    held = {name: part.tensor for name, part in expert_weights(folder, mp).held.items() if isinstance(part, Whole)}
    counts: dict[str, int] = {}
    for name in held:
        if match := _NUMBER.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    split: list[list[tuple[str, StoredTensor]]] = [[] for _ in range(ranks)]
    for name, tensor in held.items():
        if match := _NUMBER.fullmatch(name):
            split[int(match[2]) * ranks // counts[match[1]]].append((name, tensor))
    return split
