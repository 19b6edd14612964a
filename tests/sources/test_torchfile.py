"""Files of torch.save as checkpoints: names, ties, optimizers, shards."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.operations.convert import convert
from ckptengine.operations.opening import open_any
from ckptengine.sources.detect import open_source

from .trees import counting, holds


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def trained(named: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_state_dict_is_presented_under_model(tmp_path: Path, name: str) -> None:
    model = net()
    torch.save(model.state_dict(), tmp_path / name)
    source = open_source(tmp_path)
    assert source.format == "torch"
    holds(source, {f"model.{key}": tensor for key, tensor in model.state_dict().items()})
    assert source.values() == {}


@pytest.mark.parametrize("named", [True, False])
def test_nested_state_with_an_optimizer(tmp_path: Path, named: bool) -> None:
    model, optimizer = trained(named)
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 4}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        for kind, value in optimizer.state[parameter].items():
            expected[f"optim.{name if named else number}.{kind}"] = value
    holds(source, expected)
    values: Any = source.values()
    assert values["epoch"] == 4
    assert values["optim"]["param_groups"][0]["lr"] == 0.001
    assert values["optim"]["param_groups"][0]["params"] == (["0.weight", "0.bias", "2.weight"] if named else [0, 1, 2])
    assert "param_names" not in values["optim"]["param_groups"][0]


def test_dots_in_keys_never_make_two_tensors_one(tmp_path: Path) -> None:
    torch.save({"a.b": counting(2), "a": {"b": counting(3)}}, tmp_path / "x.pt")
    holds(open_source(tmp_path), {"a\\.b": counting(2), "a.b": counting(3)})


def test_ties_are_aliases(tmp_path: Path) -> None:
    weight = counting(3, 2)
    torch.save({"model": {"emb": weight, "head": weight, "half": weight[:2]}, "x": 1}, tmp_path / "x.pt")
    source = open_source(tmp_path)
    assert source.aliases() == {"model.head": "model.emb"}
    assert source.tensor("model.head").fragments == source.tensor("model.emb").fragments
    holds(source, {"model.emb": weight, "model.head": weight, "model.half": weight[:2]})


def test_strided_tensors_are_read_in_place(tmp_path: Path) -> None:
    base = counting(4, 6)
    torch.save({"t": base.t(), "s": base[1:3, ::2], "e": base[0, :2].expand(3, 2)}, tmp_path / "x.pt")
    source = open_source(tmp_path)
    assert source.tensor("model.t").fragments[0].strides == (1, 6)
    holds(source, {"model.t": base.t(), "model.s": base[1:3, ::2], "model.e": base[0, :2].expand(3, 2)})


def test_a_single_tensor_and_a_list(tmp_path: Path) -> None:
    torch.save([counting(2), counting(3)], tmp_path / "x.pt")
    holds(open_source(tmp_path), {"model.0": counting(2), "model.1": counting(3)})


def test_shards_with_an_index(tmp_path: Path) -> None:
    made = {f"w.{i}": counting(3, start=i) for i in range(4)}
    for part in (0, 1):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: tensor for i, (name, tensor) in enumerate(made.items()) if i % 2 == part}, tmp_path / file)
    index = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(made)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    holds(open_source(tmp_path), {f"model.{name}": tensor for name, tensor in made.items()})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(NotFound, match=r"00002-of-00002\.bin.*fetch"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(Damaged, match="weight_map"):
        open_source(tmp_path)


def test_several_files_need_a_name(tmp_path: Path) -> None:
    torch.save({"a": counting(2)}, tmp_path / "a.pt")
    torch.save({"b": counting(2)}, tmp_path / "b.pt")
    with pytest.raises(UnreadableFormat, match="by name"):
        open_source(tmp_path)
    holds(open_source(tmp_path / "b.pt"), {"model.b": counting(2)})
    with pytest.raises(NotFound, match=r"'model\.x'"):
        open_source(tmp_path / "b.pt").tensor("model.x")


def test_a_module_that_was_pickled_whole(tmp_path: Path) -> None:
    class_ = nn.BatchNorm1d(3)
    class_.register_buffer("scratch", counting(2), persistent=False)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), class_)
    torch.save(model, tmp_path / "x.pt")
    holds(open_source(tmp_path), {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def test_tensors_that_are_no_bytes_are_errors_of_their_own(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    lazy = torch.ones(2, dtype=torch.complex64).conj()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        torch.save({"a": counting(2), "sparse": sparse, "lazy": lazy, "q": quantized}, tmp_path / "x.pt")
    source = open_source(tmp_path)
    assert list(source.names()) == ["model.a", "model.sparse", "model.lazy", "model.q"]
    assert source.tensor("model.a").shape == (2,)
    for name in ("sparse", "lazy", "q"):
        with pytest.raises(UnreadableFormat, match=f"'model.{name}'.*dense"):
            source.tensor(f"model.{name}")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"a": counting(2), "x": Runs()}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    holds(source, {"model.a": counting(2)})
    values: Any = source.values()
    assert values["x"]["__class__"].endswith(".system")
    assert not (tmp_path / "ran").exists()


class Attributes:
    def __init__(self, **parts: object) -> None:
        self.__dict__.update(parts)


class Slots:
    __slots__ = ("k", "t")


class Arguments:
    def __init__(self, tensor: object, more: object = 7) -> None:
        self.parts = tensor, more

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return Arguments, self.parts


class OwnState:
    def __getstate__(self) -> object:
        return (torch.arange(4.0), {"x": torch.ones(2)})

    def __setstate__(self, state: object) -> None: ...


class Items(list[object]):
    pass


class Pairs(dict[str, object]):
    pass


def test_tensors_in_objects_of_unknown_classes_are_not_lost(tmp_path: Path) -> None:
    slots, pairs = Slots(), Pairs(a=torch.ones(1))
    slots.k, slots.t = 3, torch.full((2,), 2.0)
    pairs.extra, pairs.a = torch.full((3,), 3.0), torch.full((4,), 4.0)
    state = {
        "attributes": Attributes(t=torch.arange(5.0), deep={"list": [Attributes(w=torch.ones(5)), 1]}),
        "slots": slots,
        "arguments": Arguments(torch.full((6,), 6.0)),
        "own": OwnState(),
        "items": Items([torch.full((7,), 7.0), "text"]),
        "pairs": pairs,
        "model": {"w": torch.zeros(2)},
    }
    torch.save(state, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    expected = {
        "attributes.t": torch.arange(5.0), "attributes.deep.list.0.w": torch.ones(5), "slots.t": torch.full((2,), 2.0),
        "arguments.0": torch.full((6,), 6.0), "own.0": torch.arange(4.0), "own.1.x": torch.ones(2),
        "items.0": torch.full((7,), 7.0), "pairs.a": torch.ones(1), "pairs.extra": torch.full((3,), 3.0),
        "pairs.state.a": torch.full((4,), 4.0), "model.w": torch.zeros(2),
    }  # fmt: skip
    holds(source, expected)
    convert(tmp_path / "x.pt", tmp_path / "out", to="native")
    holds(open_any(tmp_path / "out"), expected)


def test_an_object_may_be_all_of_a_file_and_refer_to_itself(tmp_path: Path) -> None:
    root = Attributes(model={"w": torch.arange(3.0)}, step=5)
    root.__dict__.update(parent=root, again=[root, Attributes(of=root)])
    torch.save(root, tmp_path / "x.pt")
    holds(open_source(tmp_path / "x.pt"), {"model.w": torch.arange(3.0)})


def test_a_tensor_whose_class_makes_its_elements_is_named_and_not_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jagged = torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)], layout=torch.jagged)
        torch.save({"model": {"ok": torch.ones(3), "w": jagged}}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert sorted(source.names()) == ["model.ok", "model.w"]
    with pytest.raises(UnreadableFormat, match=r"'model.w' .* of class torch.nested.*NestedTensor"):
        source.tensor("model.w")
