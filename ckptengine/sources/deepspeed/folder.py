"""Which files of a DeepSpeed step folder belong to which rank."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ckptengine.errors import NotFound, UnreadableFormat
from ckptengine.sources.port import Files

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODEL3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(slots=True)
class StepFolder:
    """File names by rank.  ``mp`` counts model-parallel ranks (pipeline-major), ``dp`` data-parallel ones."""

    files: Files
    model: dict[int, str] = field(default_factory=dict)  # mp
    model3: dict[tuple[int, int], str] = field(default_factory=dict)  # (mp, dp), ZeRO-3
    optim: dict[tuple[int, int], str] = field(default_factory=dict)  # (mp, dp)
    layers: dict[tuple[int, int], str] = field(default_factory=dict)  # (layer, tp)
    experts: dict[tuple[int, int, int], str] = field(default_factory=dict)  # (moe layer, expert, mp)
    expert_optim: dict[tuple[int, int], str] = field(default_factory=dict)  # (mp, ep)
    universal: bool = False

    @property
    def is_checkpoint(self) -> bool:
        return bool(self.model or self.model3)

    def optim_ranks(self, mp: int, count: int | None) -> list[str]:
        """The optimizer files of one model-parallel rank by dp rank; all ``count`` of them must exist."""
        held = {dp: path for (rank, dp), path in self.optim.items() if rank == mp}
        wanted = count if count is not None else max(held, default=-1) + 1
        missing = [dp for dp in range(wanted) if dp not in held]
        if missing:
            kind = next((path.partition("zero_")[0] for path in held.values()), "")
            name = f"{kind}zero_pp_rank_{missing[0]}_mp_rank_{mp:02d}_optim_states.pt"
            raise NotFound(
                f"{self.files.root} has no optimizer file {name}; "
                f"{wanted} data-parallel ranks wrote this checkpoint and {len(missing)} file(s) are missing"
            )
        return [held[dp] for dp in range(wanted)]


def read_folder(files: Files) -> StepFolder:
    """Sort the names of a folder; a folder of another format has neither ``model`` nor ``model3``."""
    folder = StepFolder(files)
    for name in files.entries():
        if match := _MODEL.fullmatch(name):
            folder.model[int(match[1])] = name
        elif match := _MODEL3.fullmatch(name):
            folder.model3[int(match[2]), int(match[1])] = name
        elif match := _OPTIM.fullmatch(name):
            folder.optim[int(match[2]), int(match[1])] = name
        elif match := _LAYER.fullmatch(name):
            folder.layers[int(match[1]), int(match[2] or 0)] = name
        elif match := _EXPERT.fullmatch(name):
            folder.experts[int(match[1]), int(match[2]), int(match[3])] = name
        elif match := _EXPERT_OPTIM.fullmatch(name):
            folder.expert_optim[int(match[2]), int(match[1])] = name
        elif name == "zero/":
            folder.universal = True
    return folder


def check_ranks(folder: StepFolder) -> int:
    """The number of model-parallel ranks; their model files must be complete."""
    held = set(folder.model) or {mp for mp, _ in folder.model3}
    count = max(held, default=-1) + 1
    missing = sorted(set(range(count)) - held)
    if missing:
        raise NotFound(f"{folder.files.root} lacks the model file of mp_rank {missing[0]:02d}; {count} ranks wrote it")
    if not count:
        raise UnreadableFormat(f"{folder.files.root} holds no DeepSpeed model file")
    return count
