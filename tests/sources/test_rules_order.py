"""The ``regroup`` key and ``stack`` on two dimensions, against numpy, and the presets that use them, there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import RuleError
from ckptengine.sources.rules.parse import load_rules, parse_rules
from ckptengine.sources.rules.present import present

from .memory import MemorySource
from .reading import read_bytes

HEAD = "version = 1\n"


def shown(source: MemorySource, name: str) -> np.ndarray:
    tensor = source.tensor(name)
    return np.frombuffer(read_bytes(source.files, tensor), tensor.dtype).reshape(tensor.shape)


def index_array(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def fused(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """Parts in ``groups`` groups that hold one run of every part each."""
    return np.concatenate([run for runs in zip(*(np.split(p, groups) for p in parts), strict=True) for run in runs])


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    before=st.sampled_from([1, 2, 3, 4, 6]),
    after=st.sampled_from([1, 2, 3, 4, 6]),
    unit=st.integers(1, 2),
    data=st.data(),
)
def test_regroup_is_a_permutation(widths: list[int], before: int, after: int, unit: int, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([0, 1]))
    parts, start = [], 0
    for width in widths:
        rows = 12 * width * unit
        parts.append(np.arange(start, start + rows * 2).reshape(rows, 2))
        start += rows * 2
    old, new = fused(parts, before), fused(parts, after)
    source = MemorySource({"model.w": np.ascontiguousarray(old if dim == 0 else old.T)})
    text = f"[[rule]]\nmatch = 'w'\nregroup = {{ dim = {dim}, parts = {widths}, from = {before}, to = {after} }}"
    view = present(source, parse_rules(HEAD + text, "test.toml"))
    assert (shown(view, "model.w") == (new if dim == 0 else new.T)).all()


STACK = """[[rule]]
match = 'l\\.(?P<layer>\\d+)\\.e\\.(?P<expert>\\d+)\\.up'
rename = "l.e.fused"
join = { part = 0, widths = [1, 1] }
stack = ["layer", "expert"]
[[rule]]
match = 'l\\.(?P<layer>\\d+)\\.e\\.(?P<expert>\\d+)\\.gate'
rename = "l.e.fused"
join = { part = 1, widths = [1, 1] }
stack = ["layer", "expert"]
"""


def test_stack_of_layers_and_experts() -> None:
    whole = index_array(2, 3, 4, 5)
    arrays = {}
    for layer in range(2):
        for expert in (2, 0, 1):
            arrays[f"model.l.{layer}.e.{expert}.up"] = whole[layer, expert, :2]
            arrays[f"model.l.{layer}.e.{expert}.gate"] = whole[layer, expert, 2:]
    rules = parse_rules(HEAD + STACK, "test.toml")
    view = present(MemorySource(arrays), rules)
    assert list(view.names()) == ["model.l.e.fused"]
    assert (shown(view, "model.l.e.fused") == whole).all()
    del arrays["model.l.1.e.1.gate"]
    with pytest.raises(RuleError, match="layer 1, 1, part 1 is missing"):
        present(MemorySource(arrays), rules)


@pytest.mark.parametrize(
    "text",
    [
        "regroup = 3",
        "regroup = { dim = 0, parts = [1], from = 2 }",
        "regroup = { dim = 0, parts = [1, 1], groups = 2 }",
        "regroup = { parts = ['a', 1.5] }",
        "stack = []\nrename = 'b'",
        "stack = [1, 1]\nrename = 'b'",
        "stack = [1, 2, 3]\nrename = 'b'",
        "stack = ['x']\nrename = 'b'",
        "stack = [true]\nrename = 'b'",
    ],
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(RuleError):
        parse_rules(HEAD + f"[[rule]]\nmatch = '(a)(b)(c)'\n{text}", "test.toml")


def test_a_dimension_that_does_not_divide() -> None:
    text = "[[rule]]\nmatch = 'w'\nregroup = { parts = [1, 1, 1], from = 2, to = 1 }"
    view = present(MemorySource({"model.w": index_array(9, 2)}), parse_rules(HEAD + text, "test.toml"))
    with pytest.raises(RuleError, match="9 indices cannot be divided into 2 group"):
        view.tensor("model.w")


def gpt2(heads: int) -> dict[str, np.ndarray]:
    arrays = {"wte.weight": index_array(7, 4 * heads), "wpe.weight": index_array(3, 4 * heads)}
    width = 4 * heads
    for layer in range(2):
        shapes = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
            "mlp.c_fc.weight": (width, 10), "mlp.c_fc.bias": (10,),
            "mlp.c_proj.weight": (10, width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        arrays |= {f"h.{layer}.{name}": layer * 1000 + index_array(*shape) for name, shape in shapes.items()}
    arrays |= {"ln_f.weight": index_array(width), "ln_f.bias": index_array(width)}
    return {f"model.transformer.{name}": array for name, array in arrays.items()}


def test_gpt2_to_megatron_and_back() -> None:
    """With moments, which are turned like their weights."""
    arrays = gpt2(3)
    states = {name.replace("model.", "optim.") + ".exp_avg": array + 5 for name, array in arrays.items()}
    source = MemorySource({**arrays, **states}, {"n_head": 3})
    there = present(source, load_rules("gpt2-to-megatron"))
    fused_weight = shown(there, "model.decoder.layers.self_attention.linear_qkv.weight")
    assert fused_weight.shape == (2, 36, 12)
    assert (fused_weight[1, 4:8] == arrays["model.transformer.h.1.attn.c_attn.weight"][:, 12:16].T).all()
    back = present(there, load_rules("megatron-to-gpt2:heads=3"))
    assert set(back.names()) == {*arrays, *states}
    for name, array in {**arrays, **states}.items():
        assert (shown(back, name) == array).all(), name
