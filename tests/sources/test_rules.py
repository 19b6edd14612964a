"""Rules against a brute-force model: index-valued arrays cut, fused and shown with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import NotFound, RuleError
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.port import Source
from ckptengine.sources.rules.algebra import Placed
from ckptengine.sources.rules.assemble import Assembler
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.expression import evaluate
from ckptengine.sources.rules.parse import load_rules, parse_rules, presets
from ckptengine.sources.rules.present import present

from .memory import MemoryFiles, MemorySource, stored
from .reading import read_bytes

HEAD = "version = 1\n"


def index_array(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.int64).reshape(shape)


def array_of(files: Any, placed: Placed) -> np.ndarray:
    raw = read_bytes(files, LogicalTensor("t", placed.dtype, placed.shape, placed.fragments))
    return np.frombuffer(raw, placed.dtype).reshape(placed.shape)


def assembled(text: str, name: str, pieces: list[np.ndarray], values: object = None) -> np.ndarray:
    files = MemoryFiles()
    placed = [stored(files, f"rank{rank}", piece) for rank, piece in enumerate(pieces)]
    averages = AveragedFiles(files)
    rules = parse_rules(HEAD + text, "test.toml")
    return array_of(averages, Assembler(rules, [name], values, averages).whole(name, placed))


def shown(source: Source, name: str) -> np.ndarray:
    tensor = source.tensor(name)
    return np.frombuffer(read_bytes(source.files, tensor), tensor.dtype).reshape(tensor.shape)


# layout


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    widths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    data=st.data(),
)
def test_sharded_pieces_follow_one_another(shape: list[int], widths: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(widths)
    whole = index_array(*shape)
    pieces = np.split(whole, np.cumsum(widths)[:-1], axis=dim)
    assert (assembled(f"[[rule]]\nmatch = 'w'\nshard = {dim}", "w", pieces) == whole).all()


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 5),
    parts=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    unit=st.integers(1, 3),
    dim=st.integers(0, 1),
)
def test_fused_parts_are_cut_one_by_one(ranks: int, parts: list[int], unit: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = sum(parts) * unit * ranks
    whole = index_array(*shape)
    fused = np.split(whole, np.cumsum([part * unit * ranks for part in parts])[:-1], axis=dim)
    cut = [np.split(part, ranks, axis=dim) for part in fused]
    pieces = [np.concatenate([part[rank] for part in cut], axis=dim) for rank in range(ranks)]
    text = f"[[rule]]\nmatch = 'w'\nshard = {dim}\nparts = {parts}"
    assert (assembled(text, "w", pieces) == whole).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), count=st.integers(1, 3))
def test_unequal_widths_of_parts(data: st.DataObject, ranks: int, count: int) -> None:
    row = st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks)
    widths = data.draw(st.lists(row, min_size=count, max_size=count).filter(lambda table: any(map(any, table))))
    parts = [index_array(sum(row), 2, start=1000 * number) for number, row in enumerate(widths)]
    cut = [np.split(part, np.cumsum(row)[:-1]) for part, row in zip(parts, widths, strict=True)]
    pieces = [np.concatenate([cut[part][rank] for part in range(count)]) for rank in range(ranks)]
    text = f"[[rule]]\nmatch = 'w'\nshard = 0\nwidths = {widths}"
    assert (assembled(text, "w", pieces) == np.concatenate(parts)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_average_is_the_mean_in_the_tensors_precision(dtype: str) -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.standard_normal((5, 7)).astype(dtype) for _ in range(3)]
    expected = (pieces[0] + pieces[1] + pieces[2]) / np.dtype(dtype).type(3)
    made = assembled("[[rule]]\nmatch = 'w'\naveraged = true", "w", pieces)
    assert made.tobytes() == expected.astype(dtype).tobytes()


def test_average_of_bfloat16_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.randn(41, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    files = MemoryFiles({f"r{i}": t.view(torch.int16).numpy().tobytes() for i, t in enumerate(tensors)})
    averages = AveragedFiles(files)
    path = averages.add("bfloat16", 82, (("r0", 0), ("r1", 0), ("r2", 0)))
    expected = (sum(tensors) / 3).view(torch.int16).numpy().tobytes()
    assert averages.read(path, 0, 82) == expected
    assert averages.read(path, 5, 20) == expected[5:25]


def test_replicated_takes_one() -> None:
    whole = index_array(3, 4)
    assert (assembled("[[rule]]\nmatch = 'w'\nreplicated = true", "w", [whole, whole.copy()]) == whole).all()


def test_experts_follow_one_another() -> None:
    files = MemoryFiles()
    whole = index_array(6, 2, 3)
    placed = [stored(files, str(rank), part) for rank, part in enumerate(np.split(whole, 3))]
    averages = AveragedFiles(files)
    rules = parse_rules(HEAD + "[[rule]]\nmatch = 'w'\nexpert = 0\nshard = 1", "test.toml")
    assert (array_of(averages, Assembler(rules, ["w"], None, averages).whole_experts("w", placed)) == whole).all()


@pytest.mark.parametrize(
    ("text", "shapes", "said"),
    [
        ("[[rule]]\nmatch = 'w'\nreplicated = true", [(2, 3), (4, 3)], "shard = 0"),
        ("[[rule]]\nmatch = 'w'\naveraged = true", [(2, 3), (2, 2)], "shard = 1"),
        ("[[rule]]\nmatch = 'w'\nshard = 0", [(2, 3), (2, 4)], "shard = 1"),
        ("[[rule]]\nmatch = 'w'\nshard = 2", [(2, 3), (2, 3)], "no dimension 2"),
        ("[[rule]]\nmatch = 'w'\nshard = 0\nparts = [1, 2]", [(4, 3), (4, 3)], "4 indices cannot be divided"),
        ("[[rule]]\nmatch = 'w'\nshard = 0\nwidths = [[1, 2]]", [(2, 3), (2, 3)], "do not add up"),
        ("[[rule]]\nmatch = 'w'\nshard = 0\nparts = ['heads']", [(2, 3), (2, 3)], "'heads' is not a name"),
        ("[[rule]]\nmatch = 'w'\nrename = 'v'", [(2, 3), (2, 3)], "no rule says what the pieces mean"),
    ],
)
def test_shapes_that_a_rule_cannot_explain(text: str, shapes: list[tuple[int, ...]], said: str) -> None:
    with pytest.raises(RuleError) as caught:
        assembled(text, "w", [index_array(*shape) for shape in shapes])
    assert said in str(caught.value)


def test_nothing_is_put_together_without_rules() -> None:
    files = MemoryFiles()
    name = "model.layers.0.self_attn.q_proj.weight"
    placed = [stored(files, str(rank), index_array(2, 2)) for rank in range(2)]
    with pytest.raises(RuleError) as caught:
        Assembler(None, [name], None, AveragedFiles(files)).whole(name, placed)
    assert "llama" in str(caught.value)
    assert "shard = <dimension>" in str(caught.value)


# view


def qkv(heads: int, groups: int, width: int, hidden: int, layers: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Megatron's fused query, key, value of all layers; and for each layer the three matrices."""
    per = heads // groups
    fused, parts = [], []
    for layer in range(layers):
        q = index_array(heads * width, hidden, start=layer * 10**6)
        k = index_array(groups * width, hidden, start=layer * 10**6 + 10**5)
        v = index_array(groups * width, hidden, start=layer * 10**6 + 2 * 10**5)
        rows = []
        for g in range(groups):
            rows.append(q[g * per * width : (g + 1) * per * width])
            rows += [k[g * width : (g + 1) * width], v[g * width : (g + 1) * width]]
        fused.append(np.concatenate(rows))
        parts.append([q, k, v])
    return np.stack(fused), parts


SPLIT = """
[let]
heads = { from = ["args.heads"] }
groups = { from = ["args.groups"], default = "heads" }
[[rule]]
match = 'layers\\.qkv\\.(weight)'
unstack = 0
[rule.split]
dim = 0
groups = "groups"
parts = [
  { rename = "h.{index}.q.{1}", width = "heads / groups" },
  { rename = "h.{index}.k.{1}" },
  { rename = "h.{index}.v.{1}" },
]
"""
JOIN = """
[let]
heads = 1
groups = 1
[[rule]]
match = 'h\\.(?P<n>\\d+)\\.q\\.weight'
rename = "layers.qkv.weight"
join = { part = 0, widths = ["heads / groups", 1, 1], groups = "groups" }
stack = "n"
[[rule]]
match = 'h\\.(?P<n>\\d+)\\.k\\.weight'
rename = "layers.qkv.weight"
join = { part = 1, widths = ["heads / groups", 1, 1], groups = "groups" }
stack = "n"
[[rule]]
match = 'h\\.(?P<n>\\d+)\\.v\\.weight'
rename = "layers.qkv.weight"
join = { part = 2, widths = ["heads / groups", 1, 1], groups = "groups" }
stack = "n"
"""


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_split_and_unstack_and_back(heads: int, groups: int) -> None:
    fused, parts = qkv(heads, groups, 3, 5, 2)
    arrays = {"model.layers.qkv.weight": fused, "optim.layers.qkv.weight.exp_avg": fused + 7}
    arrays["optim.layers.qkv.weight.step"] = np.array(9, np.int64)
    optimizer = {"param_groups": [{"params": ["layers.qkv.weight"]}]}
    values = {"args": {"heads": heads, "groups": groups}, "optim": optimizer}
    source = MemorySource(arrays, values)
    view = present(source, parse_rules(HEAD + SPLIT, "test.toml"))
    assert set(view.names()) == {
        f"{root}h.{layer}.{part}.weight{state}"
        for layer in range(2)
        for part in "qkv"
        for root, state in (("model.", ""), ("optim.", ".exp_avg"), ("optim.", ".step"))
    }
    for layer in range(2):
        for part, expected in zip("qkv", parts[layer], strict=True):
            assert (shown(view, f"model.h.{layer}.{part}.weight") == expected).all()
            assert (shown(view, f"optim.h.{layer}.{part}.weight.exp_avg") == expected + 7).all()
            assert shown(view, f"optim.h.{layer}.{part}.weight.step") == 9
    groups_shown: Any = view.values()
    assert len(groups_shown["optim"]["param_groups"][0]["params"]) == 6

    text = JOIN.replace("heads = 1\n", f"heads = {heads}\n").replace("groups = 1\n[", f"groups = {groups}\n[")
    back = present(view, parse_rules(HEAD + text, "back.toml"))
    assert set(back.names()) == set(source.names())
    for name, array in arrays.items():
        assert (shown(back, name) == array).all(), name


@pytest.mark.parametrize(
    ("preset", "gate", "up", "down", "router"),
    [
        (
            "megatron-to-mixtral",
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
            "block_sparse_moe.gate.weight",
        ),
        (
            "megatron-to-qwen3-moe",
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
            "mlp.experts.{}.down_proj.weight",
            "mlp.gate.weight",
        ),
    ],
)
@pytest.mark.parametrize("form", ["stacked", "layers", "single", "grouped"])
def test_experts_of_megatron(form: str, preset: str, gate: str, up: str, down: str, router: str) -> None:
    """Two layers of three experts as torch_dist and the legacy folders name them, optimizer included."""
    first, second, routers = index_array(2, 3, 8, 5), index_array(2, 3, 5, 4) + 1000, index_array(2, 3, 5) + 2000
    inner = "mlp.experts.experts.linear_fc"
    arrays: dict[str, Any] = {}
    if form == "stacked":
        arrays = {f"{inner}1.weight": first, f"{inner}2.weight": second, "mlp.router.weight": routers}
    for layer in range(2) if form != "stacked" else ():
        arrays[f"{layer}.mlp.router.weight"] = routers[layer]
        if form == "layers":
            arrays |= {f"{layer}.{inner}1.weight": first[layer], f"{layer}.{inner}2.weight": second[layer]}
        if form == "grouped":
            products = first[layer].swapaxes(1, 2), second[layer].swapaxes(1, 2)
            arrays |= {f"{layer}.mlp.experts.weight{at}": np.ascontiguousarray(w) for at, w in enumerate(products, 1)}
        for expert in range(3) if form == "single" else ():
            local = f"{layer}.mlp.experts.local_experts.{expert}.linear_fc"
            arrays |= {f"{local}1.weight": first[layer, expert], f"{local}2.weight": second[layer, expert]}
    held = {f"model.decoder.layers.{name}": array for name, array in arrays.items()}
    held |= {f"optim.decoder.layers.{name}.exp_avg": array + 1 for name, array in arrays.items()}
    view = present(MemorySource(held, {}), load_rules(preset))
    expected = {}
    for layer in range(2):
        expected[f"model.layers.{layer}.{router}"] = routers[layer]
        for expert in range(3):
            expected[f"model.layers.{layer}.{gate.format(expert)}"] = first[layer, expert, :4]
            expected[f"model.layers.{layer}.{up.format(expert)}"] = first[layer, expert, 4:]
            expected[f"model.layers.{layer}.{down.format(expert)}"] = second[layer, expert]
    assert len(view.names()) == 2 * len(expected)
    for name, array in expected.items():
        assert (shown(view, f"model.{name}") == array).all(), name
        assert (shown(view, f"optim.{name}.exp_avg") == array + 1).all(), name


def test_extending_a_file_keeps_all_of_its_rules() -> None:
    for preset in ("megatron-to-llama", "megatron-to-mixtral"):
        for matrix in ("weight1", "weight2"):
            name = f"decoder.layers.0.mlp.experts.{matrix}"
            own, taken = load_rules("megatron-gpt").layout_rule(name), load_rules(preset).layout_rule(name)
            assert own is not None
            assert taken is not None
            fields = ("layout", "expert", "pieces", "where")
            assert [getattr(own[0], field) for field in fields] == [getattr(taken[0], field) for field in fields]
            assert own[0].pieces is not None


def test_weights_at_the_top_of_torchtitans_folders() -> None:
    held = {"tok.weight": index_array(3), "layers.0.w": index_array(2), "train_state.step": index_array(1)}
    held |= {"optimizer.layers.0.w.exp_avg": index_array(2) + 5}
    view = present(MemorySource(held, {}), load_rules("torchtitan"))
    assert set(view.names()) == {
        "model.tok.weight", "model.layers.0.w", "optim.layers.0.w.exp_avg", "train_state.step"
    }  # fmt: skip
    assert (shown(view, "optim.layers.0.w.exp_avg") == index_array(2) + 5).all()


def test_transpose_unpadded_rename_drop_and_ties() -> None:
    whole = index_array(8, 3)
    source = MemorySource({"model.a.w": whole, "model.b": index_array(2), "model.head": whole + 1, "extra": whole})
    text = """
    [[rule]]
    match = 'a\\.(?P<k>.)'
    unpadded = { dim = 0, extent = "5 + 1" }
    transpose = true
    rename = "c.{k}"
    [[rule]]
    match = 'b'
    drop = true
    [[rule]]
    match = 'head'
    tied = "c.w"
    [[rule]]
    match = 'extra'
    rename = "model.renamed"
    """
    view = present(source, parse_rules(HEAD + text, "test.toml"))
    assert list(view.names()) == ["model.c.w", "model.renamed", "model.head"]
    assert (shown(view, "model.c.w") == whole[:6].T).all()
    assert (shown(view, "model.head") == whole[:6].T).all()
    assert view.aliases() == {"model.head": "model.c.w"}
    with pytest.raises(NotFound):
        view.tensor("model.a.w")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rule]]\nmatch = 'a'\nrename = 'b'", "both 'model.b' and 'model.a' become 'model.b'"),
        ("[[rule]]\nmatch = 'zz'\nrename = 'b'", "match no tensor"),
        ("[[rule]]\nmatch = 'a'\nrename = 'c'\n[[rule]]\nmatch = '[a]'\nrename = 'd'", "both claim 'a'"),
        ("[[rule]]\nmatch = 'a'\nrename = '{2}'", "{2}"),
        ("[[rule]]\nmatch = 'a'\nunstack = 5\nrename = 'x{index}'", "no dimension 5"),
        ("[[rule]]\nmatch = 'a'\nrename = 'x'\njoin = { part = 1, widths = [1, 1] }", "layer 0, part 0 is missing"),
        ("[[rule]]\nmatch = '(a)'\nrename = 'x'\nstack = 1", "not the number of a layer"),
    ],
)
def test_views_that_cannot_be(text: str, said: str) -> None:
    source = MemorySource({"model.b": index_array(2), "model.a": index_array(3)})
    with pytest.raises(RuleError) as caught:
        present(source, parse_rules(HEAD + text, "test.toml"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unpadded = { dim = 0, extent = 4 }\nrename = 'x'", "only 3 indices"),
        ("transpose = [1, 0]\nrename = 'x'", "does not fit"),
        ("split = { dim = 0, groups = 2, parts = [{ rename = 'x' }] }", "cannot be divided"),
        ("split = { dim = 0, parts = [{ rename = 'x', width = 'n' }] }", "does not say 'n'"),
    ],
)
def test_tensors_that_a_view_does_not_fit(text: str, said: str) -> None:
    source = MemorySource({"model.a": index_array(3, 2, 1)}, {})
    rules = parse_rules(HEAD + "[let]\nn = { from = ['args.n'] }\n[[rule]]\nmatch = 'a'\n" + text, "test.toml")
    with pytest.raises(RuleError) as caught:
        present(source, rules).tensor("model.x")
    assert said in str(caught.value)


# the language


@pytest.mark.parametrize(
    "text",
    [
        "version = 2",
        "",
        "version = 1\nrules = 3",
        "version = 1\n[[rule]]",
        "version = 1\n[[rule]]\nmatch = 3",
        "version = 1\n[[rule]]\nmatch = '('\nshard = 0",
        "version = 1\n[[rule]]\nmatch = 'a'",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = -1",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = true",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nreplicated = true",
        "version = 1\n[[rule]]\nmatch = 'a'\nreplicated = false",
        "version = 1\n[[rule]]\nmatch = 'a'\nparts = [1]",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nparts = []",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nparts = [1.5]",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nwidths = [[1], 2]",
        "version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nwidths = [[1]]\nparts = [1, 1]",
        "version = 1\n[[rule]]\nmatch = 'a'\ncolour = 'red'",
        "version = 1\n[[rule]]\nmatch = 'a'\nstack = 1\nrename = 'b'",
        "version = 1\n[[rule]]\nmatch = '(a)'\nstack = 1",
        "version = 1\n[[rule]]\nmatch = 'a'\nunstack = 0\nrename = 'b'",
        "version = 1\n[[rule]]\nmatch = 'a'\nunstack = [0, 1]\nrename = 'b{index}'",
        "version = 1\n[[rule]]\nmatch = 'a'\nunstack = [1, 1]\nrename = 'b{index}{index2}'",
        "version = 1\n[[rule]]\nmatch = 'a'\nunstack = []\nrename = 'b{index}'",
        "version = 1\n[[rule]]\nmatch = 'a'\nunstack = ['x']\nrename = 'b{index}'",
        "version = 1\n[[rule]]\nmatch = 'a'\ntranspose = [0, 2]",
        "version = 1\n[[rule]]\nmatch = 'a'\nsplit = { parts = [] }",
        "version = 1\n[[rule]]\nmatch = 'a'\nsplit = { parts = [{ rename = 'b' }] }\nrename = 'c'",
        "version = 1\n[[rule]]\nmatch = 'a'\nrename = 'b'\njoin = { part = 2, widths = [1, 1] }",
        "version = 1\n[let]\n'a-b' = 3",
        "version = 1\n[let]\na = { form = ['x'] }",
        "version = 1\nextends = 3",
        "not toml",
    ],
)
def test_files_that_do_not_follow_the_schema(text: str) -> None:
    with pytest.raises(RuleError, match=r"test\.toml"):
        parse_rules(text, "test.toml")


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab12+-*/() .[]'", max_size=12))
def test_expressions_never_run_anything(text: str) -> None:
    try:
        value = evaluate(text, lambda name: len(name), "here")
    except RuleError:
        return
    assert isinstance(value, int)
    assert not isinstance(value, bool)


def test_expressions() -> None:
    names = {"heads": 12, "groups": 4}
    assert evaluate("(heads / groups + 2) * groups - 7 // 2", names.__getitem__, "here") == 17
    for text in ("heads / 5", "1 / 0", "heads ** 2", "f(1)", "heads.bit_length", "1.5", "True", "'a'", "9" * 300):
        with pytest.raises(RuleError):
            evaluate(text, names.__getitem__, "here")


def test_variables_in_a_circle() -> None:
    rules = parse_rules(HEAD + "[let]\na = 'b'\nb = 'a'", "test.toml")
    with pytest.raises(RuleError, match="circle"):
        rules.value("a", {}, "here")


def test_every_preset_parses_and_takes_arguments() -> None:
    assert {"llama", "gpt2", "neox", "mixtral", "megatron-gpt"} <= set(presets())
    for name in presets():
        assert load_rules(name).rules
    rules = load_rules("megatron-to-llama:heads=8,query_groups=2")
    assert rules.value("heads / query_groups", {"args": {"num_attention_heads": 3}}, "here") == 4
    for bad in ("megatron-to-llama:heads", "megatron-to-llama:colour=3", "megatron-to-llama:heads=x"):
        with pytest.raises(RuleError):
            load_rules(bad)
    with pytest.raises(NotFound, match="llama"):
        load_rules("no-such-preset")


def test_own_rules_go_before_those_extended(tmp_path: Any) -> None:
    (tmp_path / "base.toml").write_text(HEAD + "[let]\nn = 2\n[[rule]]\nmatch = 'w.*'\nshard = 0\noptional = true")
    (tmp_path / "own.toml").write_text(HEAD + "extends = 'base.toml'\n[[rule]]\nmatch = 'w'\nreplicated = true")
    rules = load_rules(tmp_path / "own.toml")
    claim, other = rules.layout_rule("w"), rules.layout_rule("w2")
    assert claim is not None
    assert "own.toml" in claim[0].where
    assert other is not None
    assert "base.toml" in other[0].where
    (tmp_path / "loop.toml").write_text(HEAD + "extends = 'loop.toml'")
    with pytest.raises(RuleError, match="extend each other"):
        load_rules(tmp_path / "loop.toml")
