"""FSDP1: every parameter behind a flat one is a logical tensor of its own, its optimizer state too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptengine.errors import StateMismatch, UnsupportedValue
from ckptengine.layout.sharding import Sharding
from ckptengine.state.fill import prepare
from ckptengine.state.flatten import flatten
from ckptengine.state.leaves import FlatState
from ckptengine.state.walker import Walker

from .helpers import MemoryCheckpoint, save

pytestmark = pytest.mark.filterwarnings("ignore")
WAYS = pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
FULL, ZERO2, NONE = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Sizes that nothing divides; two names of one weight; a weight whose memory is not row-major."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(2, 3, 2)
        self.conv.to(memory_format=torch.channels_last)
        self.head, self.tied = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.tensor([1.25, 0.3]))
        start = 1.0
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape) * scale)
                start += parameter.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        pixels = self.conv(x[:, :4].reshape(-1, 2, 2, 1).expand(-1, 2, 2, 2))
        return self.tied(self.head(x)) * self.scale.sum() + pixels.sum()


def fsdp1(original: bool, net: nn.Module | None = None, **options: Any) -> FullyShardedDataParallel:
    options.setdefault("auto_wrap_policy", ModuleWrapPolicy({Block}))
    return FullyShardedDataParallel(net or Net(), use_orig_params=original, device_id=torch.device("cpu"), **options)


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step at a learning rate of 0 whose gradients are the parameters: SGD's momentum becomes their copy."""
    for parameter in module.parameters():
        if parameter.numel():
            parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)


def whole(net: nn.Module | None = None) -> MemoryCheckpoint:
    """What one process saves of the same model and optimizer."""
    net = net or Net()
    optimizer = sgd(net)
    stepped(net, optimizer)
    return save({"model": net, "optim": optimizer})


def flattened(as_rank: Any, world: int, make: Callable[[], nn.Module]) -> list[FlatState]:
    """The state of each rank, after a step."""
    flats = []
    for rank in range(world):
        as_rank(rank, world)
        module = make()
        optimizer = sgd(module)
        stepped(module, optimizer)
        flats.append(flatten({"model": module, "optim": optimizer}, random=False))
    return flats


def assert_same(found: MemoryCheckpoint, expected: MemoryCheckpoint) -> None:
    assert found.data.keys() == expected.data.keys()
    for name, tensor in expected.data.items():
        assert torch.equal(found.data[name], tensor), name


@WAYS
@pytest.mark.parametrize("world", [2, 3, 8, 64])
@pytest.mark.parametrize("policy", [ModuleWrapPolicy({Block}), None], ids=["nested", "one"])
def test_parameters_and_their_state_are_those_of_the_plain_model(as_rank, original, world, policy):
    flats = flattened(as_rank, world, lambda: fsdp1(original, auto_wrap_policy=policy))
    assert_same(MemoryCheckpoint(*flats), whole())
    assert all(flat.aliases["model.tied.weight"] == "model.head.weight" for flat in flats)
    leaves = {leaf.name: leaf for leaf in flats[0].tensors}
    assert isinstance(leaves["model.blocks.0.up.weight"].sharding, Sharding)  # one line, however many ranks
    assert not any(leaf.eager for leaf in leaves.values() if leaf.role == "parameter")


@WAYS
@pytest.mark.parametrize("strategy", [ZERO2, NONE], ids=["ZeRO-2", "none"])
def test_other_strategies(as_rank, original, strategy):
    flats = flattened(as_rank, 2, lambda: fsdp1(original, sharding_strategy=strategy))
    assert_same(MemoryCheckpoint(*flats), whole())


@WAYS
def test_below_and_above_activation_checkpoints_and_beside_ignored_modules(as_rank, original):
    def make() -> nn.Module:
        net = Net()
        net.blocks[0] = checkpoint_wrapper(net.blocks[0])
        net.blocks[1].up = checkpoint_wrapper(net.blocks[1].up)
        return fsdp1(original, net, ignored_modules=[net.conv])

    flats = flattened(as_rank, 2, make)
    assert_same(MemoryCheckpoint(*flats), whole())
    assert {leaf.name: leaf.sharding for leaf in flats[0].tensors}["model.conv.weight"] is None


class Even(nn.Module):
    """Sizes that two tensor-parallel ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for start, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 100.0 * start)


@WAYS
def test_over_tensor_parallelism(as_rank, original):
    def make() -> nn.Module:
        net, mesh = Even(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()}, src_data_rank=None)
        return fsdp1(original, net, auto_wrap_policy=None, device_mesh=mesh["dp"])

    assert_same(MemoryCheckpoint(*flattened(as_rank, 4, make)), whole(Even()))


@WAYS
@pytest.mark.parametrize("world", [2, 3])
def test_restoring_fills_the_shard_and_leaves_padding_alone(as_rank, original, world):
    saved = whole()
    for rank in range(world):
        as_rank(rank, world)
        expected, module = fsdp1(original), fsdp1(original, Net(scale=0.0))
        optimizer = sgd(module)
        saved.restore({"model": module, "optim": optimizer}, random=False)
        for a, b in zip(handles(expected), handles(module), strict=True):
            assert torch.equal(a.flat_param, b.flat_param)
        for parameter in module.parameters():
            state = optimizer.state.get(parameter, {})
            assert bool(state) == bool(parameter.numel())
            if state:
                assert torch.equal(state["momentum_buffer"], parameter)


def handles(module: nn.Module) -> list[Any]:
    return [part._handle for part in module.modules() if isinstance(part, FullyShardedDataParallel)]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    large = [p for name, p in module.named_parameters() if "up" in name]
    small = [p for name, p in module.named_parameters() if "up" not in name]
    return torch.optim.Adam([{"params": large}, {"params": small, "lr": 0.01}, {"params": []}], lr=0.1, fused=False)


def test_groups_keep_their_parameters_whoever_holds_them(as_rank):
    net = Net()
    optimizer = adam(net)
    stepped(net, optimizer)
    saved = save({"model": net, "optim": optimizer})
    flats = []
    for rank in range(3):
        as_rank(rank, 3)
        module = fsdp1(True, Net(scale=0.0))
        fresh = adam(module)
        saved.restore({"model": module, "optim": fresh}, random=False)
        assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.01, 0.1]
        flats.append(flatten({"model": module, "optim": fresh}, random=False))
    found = MemoryCheckpoint(*flats)
    assert_same(found, saved)
    rows = [[sorted(group["params"]) for group in at.values["optim"]["groups"]] for at in (saved, found)]
    assert rows[0] == rows[1]


def test_state_of_some_of_a_flat_parameters_parts(as_rank):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    for parameter in (net.conv.bias, net.blocks[1].up.weight, net.blocks[1].down.weight):
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    saved = save({"model": net, "optim": optimizer})
    as_rank(0, 2)
    for live in (False, True):
        module = fsdp1(False)
        fresh = torch.optim.Adam(module.parameters(), lr=0.0)
        if live:
            stepped(module, fresh)
        saved.restore({"model": module, "optim": fresh}, random=False)
        root, first, second = (fresh.state.get(handle.flat_param) for handle in handles(module))
        assert not first  # none of its parts had been stepped
        assert root["exp_avg"].nonzero().flatten().tolist() == [24, 25, 26]  # the bias, behind the weight
        assert second["step"] == 1
        again = MemoryCheckpoint(flatten({"model": module, "optim": fresh}, random=False))
        assert torch.equal(
            again.data["optim.blocks.1.up.weight.exp_avg"], saved.data["optim.blocks.1.up.weight.exp_avg"]
        )


def test_counters_that_one_flat_parameter_cannot_hold_are_told(as_rank):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    stepped(net, optimizer)
    optimizer.state[net.blocks[0].up.bias]["step"] += 1
    saved = save({"model": net, "optim": optimizer})
    as_rank(0, 2)
    module = fsdp1(False)
    state = {"model": module, "optim": torch.optim.Adam(module.parameters(), lr=0.0)}
    digests = {name: hash(tuple(tensor.flatten().tolist())) for name, tensor in saved.data.items()}
    with pytest.raises(StateMismatch, match=r"up\.bias\.step: shares its memory with"):
        prepare(state, replace(saved.saved(), digests=digests), random=False)


@WAYS
@pytest.mark.parametrize("strategy", [FULL, ZERO2], ids=["full", "ZeRO-2"])
def test_at_any_moment_between_steps(as_rank, original, strategy):
    as_rank(0, 2)
    module = fsdp1(original, sharding_strategy=strategy)
    optimizer = sgd(module)
    state = {"model": module, "optim": optimizer}
    walker = Walker(state, random=False)
    before = [(leaf, leaf.tensor.clone()) for leaf in walker.flatten().tensors if leaf.role == "parameter"]
    x = torch.ones(2, 5)

    def check(moment: str) -> None:
        for flat in (walker.flatten(), walker.flatten(), flatten(state, random=False)):
            leaves = {leaf.name: leaf for leaf in flat.tensors}
            for leaf, tensor in before:
                found = leaves[leaf.name]
                assert torch.equal(found.tensor, tensor), (moment, leaf.name)
                assert found.tensor.data_ptr() == leaf.tensor.data_ptr(), (moment, leaf.name)
                assert (found.pieces, found.owners) == (leaf.pieces, (id(optimizer),)), (moment, leaf.name)

    loss = module(x).sum()
    check("between forward and backward")
    loss.backward()
    check("after backward")
    with torch.no_grad():
        module.eval()(x)
    check("after an eval forward")
    module.train()(x)
    summoned = FullyShardedDataParallel.summon_full_params(module)
    with summoned, pytest.raises(UnsupportedValue, match=r"'model': FSDP1 is at work on .* outside of forward"):
        walker.flatten()
    check("after summon_full_params")


@WAYS
def test_an_update_shows_in_the_version_counters(as_rank, original):
    as_rank(0, 2)
    module = fsdp1(original)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=False)
    leaves = [leaf for leaf in flatten({"model": module, "optim": optimizer}, random=False).tensors if leaf.owners]
    held = [leaf for leaf in leaves if leaf.tensor.numel()]
    before = [leaf.tensor._version for leaf in held]
    module(torch.ones(2, 5)).sum().backward()
    assert [leaf.tensor._version for leaf in held] == before
    optimizer.step()
    assert all(leaf.tensor._version > version for leaf, version in zip(held, before, strict=True))


@WAYS
@pytest.mark.parametrize("strategy", [FULL, ZERO2], ids=["full", "ZeRO-2"])
def test_what_was_gathered_before_a_restore_is_let_go(as_rank, original, strategy):
    saved = whole()
    as_rank(1, 2)
    module = fsdp1(original, Net(scale=0.0), sharding_strategy=strategy)
    with torch.no_grad():
        module.eval()(torch.ones(2, 5))
    gathered = [handle.flat_param._full_param_padded.untyped_storage() for handle in handles(module)]
    assert any(storage.size() for storage in gathered)  # or the next forward would see nothing stale anyway
    saved.restore({"model": module}, random=False, names=["model"])
    assert not any(storage.size() for storage in gathered)
    for a, b in zip(handles(fsdp1(original)), handles(module), strict=True):
        assert torch.equal(a.flat_param, b.flat_param)


def test_memory_that_was_given_to_a_parameter_by_hand(as_rank):
    saved = whole()
    as_rank(0, 2)
    module = fsdp1(True)
    weight = module.head.weight
    module(torch.ones(2, 5))
    weight.data = torch.full_like(weight, 7.0)
    flat = flatten({"model": module}, random=False)
    assert {leaf.name: leaf for leaf in flat.tensors}["model.head.weight"].tensor.eq(7).all()
    saved.restore({"model": module}, random=False, names=["model"])
    (root, *_), (expected, *_) = handles(module), handles(fsdp1(True))
    assert torch.equal(root.flat_param, expected.flat_param)
    assert torch.equal(module.head.weight, fsdp1(True).head.weight)
    weight.data = torch.zeros(3, 1)
    with pytest.raises(UnsupportedValue, match=r"head.weight has the shape \(3, 1\), and FSDP1 keeps"):
        flatten({"model": module}, random=False)


def test_a_flat_parameter_with_other_memory_is_refused(as_rank):
    as_rank(0, 2)
    module = fsdp1(False)
    module(torch.ones(2, 5))
    parameter = next(module.parameters())
    parameter.data = parameter.data.clone()
    with pytest.raises(UnsupportedValue, match="other memory than FSDP1 goes on with"):
        flatten({"model": module}, random=False)


@WAYS
def test_lower_precision(as_rank, original):
    """Parameters are kept in full; buffers, which FSDP1 casts at the first forward, under the dtype that they had."""
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    as_rank(0, 2)
    module = fsdp1(original, mixed_precision=low)
    walker = Walker({"model": module}, random=False)
    key = walker.flatten().structure_key
    module(torch.ones(2, 5)).sum().backward()
    assert module.scale.dtype == torch.bfloat16
    flat = walker.flatten()
    assert flat.structure_key == key
    saved = MemoryCheckpoint(flat)
    assert torch.equal(saved.tensor("model.scale"), module.scale.float())
    module.scale.zero_()
    assert MemoryCheckpoint(walker.flatten()).tensor("model.scale").eq(0).all()
    saved.restore({"model": module}, random=False)
    assert module.scale.tolist() == torch.tensor([1.25, 0.3]).bfloat16().tolist()
    other = fsdp1(original, mixed_precision=low)
    saved.restore({"model": other}, random=False)
    assert torch.equal(other.scale, torch.tensor([1.25, 0.3]).bfloat16().float())


def test_modules_with_a_state_dict_of_their_own_are_refused(as_rank):
    as_rank(0, 2)
    net = Net()
    net.head.register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(UnsupportedValue, match="'model': FSDP1 wraps a Linear, which has a state_dict of its own"):
        flatten({"model": fsdp1(True, net)}, random=False)
