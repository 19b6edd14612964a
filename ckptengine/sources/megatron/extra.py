"""The ``_extra_state`` objects that Megatron's modules expect to find, one for each layer (and expert)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

_LINEAR = re.compile(r"(?!optimizer\.)(.*\.(?:linear_\w+|eh_proj))\.weight")
_NORM = re.compile(r"(?!optimizer\.)(.*(?:layernorm|\bnorm|\b[eh]norm))\.weight")
_ATTENTION = re.compile(r"(?!optimizer\.)(.*attention)\.linear_proj\.weight")


def extra_states(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Key -> value for the modules of the weights; the value is that of a module without any extra state.

    Linear layers have one in any case; norms and the attention itself only with Transformer Engine, and what a model
    does not look for does no harm.  Everything before a parameter's own dimensions is a grid of layers, or of layers
    and experts.
    """
    found: dict[str, object] = {}
    for key, shape in shapes.items():
        for module, own in _modules(key):
            grid = shape[:-own] or (1,)
            for at in itertools.product(*map(range, grid)) if len(shape) >= own else ():
                here, total = ".".join(map(str, at)), ".".join(map(str, grid))
                found[f"{module}._extra_state/shard_{here}_{total}"] = [None]
    return found


def _modules(key: str) -> Iterator[tuple[str, int]]:
    """The modules that a weight tells of, and how many dimensions the weight has by itself."""
    if match := _LINEAR.fullmatch(key):
        yield match[1], 2
    if match := _NORM.fullmatch(key):
        yield match[1], 1
    if match := _ATTENTION.fullmatch(key):
        yield f"{match[1]}.core_attention", 2
