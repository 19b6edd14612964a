"""AutoEP: models' own experts, one tensor of them on each expert-parallel rank, as one tensor of all experts.

The optimizer files hold ``<layer>.experts.w1`` and so on with the rank's own experts only, the model files one expert
each (``<layer>.experts.w1.<number>``).  Both become ``<layer>.experts.w1`` with all experts on dimension 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.sources.deepspeed.header import ModelStates
from ckptengine.sources.held import Held, Joined

Layers = Mapping[str, int]
"""Prefix of the experts' parameters -> how many experts there are."""

_LAYERS = "ds_autoep_layers"
_KIND = re.compile(r"(.+)\.(w[123])")
_ONE = re.compile(r"(.+\.w[123])\.(\d+)")
_MARK = "\0"


def autoep_layers(model: ModelStates) -> Layers:
    """The layers that the model file lists; empty where AutoEP was not used.

    Raises `UnreadableFormat` where their description is not understood, or ranks hold experts out of order.
    """
    listed = model.rest.get(_LAYERS)
    found: dict[str, int] = {}
    for layer in listed if isinstance(listed, list) else []:
        prefix = layer.get("expert_key_prefix") if isinstance(layer, dict) else None
        count = layer.get("num_experts") if isinstance(layer, dict) else None
        if not isinstance(prefix, str) or type(count) is not int:
            raise UnreadableFormat(f"{model.path}: {_LAYERS} does not say what the experts of a layer are called")
        if not _in_order(layer.get("expert_placement"), count):
            raise UnreadableFormat(
                f"{model.path}: the experts of {prefix} do not follow one another over the ranks, which is not read; "
                "convert it with DeepSpeed's ds_to_universal"
            )
        found[prefix] = count
    return found


def _in_order(placement: object, count: int) -> bool:
    """Whether each rank has the experts that follow the previous rank's; older files do not say and have it so."""
    if placement is None:
        return True
    ranks = placement.get("ranks") if isinstance(placement, dict) else None
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        return False
    if [rank.get("rank") for rank in ranks] != list(range(len(ranks))):
        return False
    return [expert for rank in ranks for expert in rank.get("experts") or ()] == list(range(count))


def is_expert(name: str, layers: Layers) -> bool:
    """Whether a parameter holds several experts."""
    match = _KIND.fullmatch(name)
    return match is not None and match[1] in layers


def on_rank(name: str, rank: int) -> str:
    """A name of its own for what one expert-parallel rank holds of a parameter, until `joined_states`."""
    return f"{name}{_MARK}{rank}"


def whole_name(name: str) -> str:
    """The parameter's own name."""
    return name.partition(_MARK)[0]


def joined_states(found: Iterable[tuple[str, str, Held]], layers: Layers) -> list[tuple[str, str, Held]]:
    """Entries of `ckptengine.sources.deepspeed.groups.entries`, those of `on_rank` joined; ranks in their order."""
    made: list[tuple[str, str, Held]] = []
    apart: dict[tuple[str, str], list[Held]] = {}
    for name, key, held in found:
        own = whole_name(name)
        if own == name:
            made.append((name, key, held))
        else:
            apart.setdefault((own, key), []).append(held)
    return made + [(name, key, _joined(name, parts, layers)) for (name, key), parts in apart.items()]


def _joined(name: str, parts: Sequence[Held], layers: Layers) -> Held:
    """One tensor of the ranks' experts; what is a single number is the same on all of them."""
    placed = parts[0].placed()
    if not placed.shape:
        return parts[0]
    whole = Joined(tuple(parts), stacked=False)
    match = _KIND.fullmatch(name)
    wanted = layers.get(match[1]) if match else None
    if wanted is not None and whole.placed().shape[0] != wanted:
        raise Damaged(f"the ranks hold {whole.placed().shape[0]} experts of {name}, which has {wanted}")
    return whole


def joined_weights(weights: Mapping[str, Held], layers: Layers) -> dict[str, Held]:
    """Weights of single experts, one tensor of all for those of AutoEP's layers; others as they are."""
    made: dict[str, Held] = {}
    experts: dict[str, dict[int, Held]] = {}
    for name, held in weights.items():
        match = _ONE.fullmatch(name)
        if match is not None and is_expert(match[1], layers):
            experts.setdefault(match[1], {})[int(match[2])] = held
        else:
            made[name] = held
    for name, parts in experts.items():
        wanted = layers[name.rpartition(".")[0]]
        missing = sorted(set(range(wanted)) - set(parts))
        if missing:
            raise NotFound(f"{name} has {wanted} experts, of which the file of number {missing[0]} is missing")
        if len(parts) > wanted:
            raise UnreadableFormat(f"{name} has {wanted} experts, and a file of number {max(parts)}, of another run")
        made[name] = Joined(tuple(parts[number] for number in range(wanted)), stacked=True)
    return made
