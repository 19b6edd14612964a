"""The ``_extra_state`` objects that Megatron's linear layers expect to find, one for each layer (and expert)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

_LINEAR = re.compile(r"(?!optimizer\.)(.*\.linear_(?:qkv|q|kv|proj|fc1|fc2))\.weight")


def extra_states(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Key -> value for the linear layers among the weights; the value is that of a layer without any extra state.

    Everything before a matrix's own two dimensions is a grid of layers, or of layers and experts.
    """
    found: dict[str, object] = {}
    for key, shape in shapes.items():
        match = _LINEAR.fullmatch(key)
        if match is None or len(shape) < 2:
            continue
        grid = shape[:-2] or (1,)
        for at in itertools.product(*map(range, grid)):
            here, total = ".".join(map(str, at)), ".".join(map(str, grid))
            found[f"{match[1]}._extra_state/shard_{here}_{total}"] = [None]
    return found
