"""``groups`` of a rule file: a numbered optimizer under the names of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptengine as ce
from ckptengine.errors import RuleError, UnusableRequest
from ckptengine.operations.convert import convert

GROUPS = r"""groups = ['.*(?<!norm)\.weight', '(?!.*running|.*num_batches).*']"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.middle = nn.Linear(4, 4)
        self.head.weight = self.embed.weight


def trained(path: Path) -> tuple[Net, torch.optim.Optimizer]:
    """As transformers' Trainer does it: what is a norm's or a bias decays not, in a group of its own."""
    torch.manual_seed(3)
    net = Net()
    decaying = {"embed.weight", "middle.weight"}
    named = dict(net.named_parameters())
    groups: list[Any] = [
        {"params": [p for name, p in named.items() if name in decaying], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        net.head(net.middle(net.norm(net.embed(torch.arange(6))))).square().sum().backward()
        optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}, path)
    return net, optimizer


def rules(folder: Path, text: str) -> Path:
    (folder / "rules.toml").write_text(f"version = 1\n{text}\n")
    return folder / "rules.toml"


def expected(net: Net, optimizer: torch.optim.Optimizer, root: str) -> dict[str, torch.Tensor]:
    return {
        f"{root}.{name}.{kind}": part
        for name, parameter in net.named_parameters()
        for kind, part in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("target", ["native", "torch", "deepspeed"])
def test_states_get_the_names_of_their_weights(tmp_path: Path, target: str) -> None:
    net, optimizer = trained(tmp_path / "in.pt")
    said = rules(tmp_path, GROUPS)
    with pytest.raises(UnusableRequest, match="groups = "):
        convert(tmp_path / "in.pt", tmp_path / "refused", to="deepspeed")
    source = ce.open(tmp_path / "in.pt", rules=said)
    values: Any = source.values()
    assert [group["params"] for group in values["optimizer"]["param_groups"]] == [
        ["embed.weight", "middle.weight"],
        ["norm.weight", "norm.bias", "head.bias", "middle.bias"],
    ]
    assert [group["weight_decay"] for group in values["optimizer"]["param_groups"]] == [0.1, 0.0]
    convert(tmp_path / "in.pt", tmp_path / "out", to=target, rules=said, verify=True)
    holds_states(source, expected(net, optimizer, "optimizer"))
    made = ce.open(tmp_path / "out")
    holds_states(made, expected(net, optimizer, "optim" if target == "deepspeed" else "optimizer"))
    assert torch.equal(made.read("model.head.weight"), net.embed.weight)


def holds_states(made: ce.Checkpoint, states: dict[str, torch.Tensor]) -> None:
    assert set(states) <= set(made.names())
    assert all(torch.equal(made.read(name).reshape(part.shape), part) for name, part in states.items())


def test_rules_rename_the_states_with_their_weights(tmp_path: Path) -> None:
    net, optimizer = trained(tmp_path / "in.pt")
    said = rules(tmp_path, GROUPS + "\n[[rule]]\nmatch = 'middle\\.(.*)'\nrename = 'hidden.{1}'")
    source = ce.open(tmp_path / "in.pt", rules=said)
    moment = optimizer.state[net.middle.weight]["exp_avg_sq"]
    assert torch.equal(source.read("optimizer.hidden.weight.exp_avg_sq"), moment)
    values: Any = source.values()
    assert values["optimizer"]["param_groups"][0]["params"] == ["embed.weight", "hidden.weight"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("groups = ['.*']", "1 groups, but the optimizer has 2"),
        ("groups = ['.*weight', '.*bias']", r"group 0 has 2 parameters in the checkpoint and 3 here \(embed.weight"),
        ("groups = [['embed.weight', 'x'], '.*']", "group 0 lists 'x', and there is no such weight"),
        (
            "groups = [['embed.weight', 'middle.weight'], ['head.bias', 'head.bias', 'middle.bias', 'norm.bias']]",
            "twice",
        ),
        ("groups = [['embed.weight', 1], '.*']", "a pattern, or a list of names"),
        (r"groups = ['(embed|norm)\.weight', 'middle.*|.*bias']", r"state.*|has shape \[4, 4\]"),
        ("groups = ['(', '.*']", "is not a regular expression"),
        ("groups = [1]", "is not a regular expression"),
        ("groups = '.*'", "groups"),
    ],
)
def test_groups_that_are_not_the_optimizers_are_refused(tmp_path: Path, text: str, told: str) -> None:
    trained(tmp_path / "in.pt")
    with pytest.raises(RuleError, match=told):
        ce.open(tmp_path / "in.pt", rules=rules(tmp_path, text))


def test_groups_without_a_numbered_optimizer_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Net().state_dict()}, tmp_path / "in.pt")
    with pytest.raises(RuleError, match="has 0; leave groups out"):
        ce.open(tmp_path / "in.pt", rules=rules(tmp_path, GROUPS))


def test_where_the_order_is_lost_names_are_listed(tmp_path: Path) -> None:
    """safetensors sorts: biases come before weights, and a norm's have one shape."""
    net, optimizer = trained(tmp_path / "in.pt")
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    save_file(
        {k: v.clone() for k, v in net.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text("{}")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    with pytest.raises(RuleError, match="does not keep the order of the model"):
        ce.open(folder, rules=rules(tmp_path, GROUPS))
    listed = [["embed.weight", "middle.weight"], ["norm.weight", "norm.bias", "head.bias", "middle.bias"]]
    source = ce.open(folder, rules=rules(tmp_path, f"groups = {listed}"))
    holds_states(source, expected(net, optimizer, "optim"))
    convert(folder, tmp_path / "sorted.pt", to="torch")
    with pytest.raises(RuleError, match="does not keep the order of the model"):
        ce.open(tmp_path / "sorted.pt", rules=rules(tmp_path, GROUPS))
