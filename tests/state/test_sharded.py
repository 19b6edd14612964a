"""`Sharded`, DTensors on one process's meshes, and resharding between ranks that are simulated one after another."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ckptengine.errors import LayoutError, StateMismatch, UnsupportedValue
from ckptengine.layout.sharding import Irregular, Sharding
from ckptengine.state.flatten import flatten
from ckptengine.state.sharded import Sharded
from ckptengine.state.walker import Walker

from .helpers import MemoryCheckpoint, region, save, slices


def indices(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def held(sharded: Sharded) -> torch.Tensor:
    """The logical tensor, NaN where this part holds nothing."""
    logical = torch.full(sharded.global_shape, float("nan"))
    flat = sharded.tensor.reshape(-1)
    for piece in sharded.pieces:
        logical[slices(piece.box)] = region(flat, piece)
    return logical


def test_offset():
    full = indices(5, 4)
    logical = held(Sharded(full[2:4, 1:].clone(), (5, 4), offset=(2, 1)))
    assert torch.equal(logical[2:4, 1:], full[2:4, 1:])
    assert logical.isnan().sum() == 20 - 6


@pytest.mark.parametrize(("start", "stop"), [(0, 60), (7, 31), (13, 14), (4, 4), (59, 60)])
def test_flat(start, stop):
    full = indices(3, 5, 4)
    logical = held(Sharded(full.reshape(-1)[start:stop].clone(), (3, 5, 4), flat=(start, stop)))
    expected = torch.full((60,), float("nan"))
    expected[start:stop] = full.reshape(-1)[start:stop]
    assert torch.equal(logical.nan_to_num(-1), expected.reshape(3, 5, 4).nan_to_num(-1))


def test_flat_within_a_box():
    full = indices(6, 4)
    box = full[2:5, 1:3].reshape(-1)
    logical = held(Sharded(box[1:4].clone(), (6, 4), flat=(1, 4), within=((2, 1), (3, 2))))
    assert sorted(logical[~logical.isnan()].tolist()) == sorted(box[1:4].tolist())
    assert torch.equal(logical[~logical.isnan()], full[~logical.isnan()])


def test_fused_parts_along_a_dim_and_flat():
    full = indices(12, 3)  # q: rows 0..6, k: 6..9, v: 9..12; this rank has the second half of each
    rows = [3, 4, 5, 7, 8, 10, 11]
    local = full[rows].clone()
    parts = [((3, 0), (3, 3)), ((7, 0), (2, 3)), ((10, 0), (2, 3))]
    for option in ({"dim": 0}, {}):
        logical = held(Sharded(local, (12, 3), parts=parts, **option))
        assert torch.equal(logical[rows], full[rows])
        assert logical.isnan().sum() == 36 - 21
    parts = [((0, 3), (3, 3)), ((0, 7), (3, 2)), ((0, 10), (3, 2))]
    columns = held(Sharded(full.t()[:, rows].clone(), (3, 12), parts=parts, dim=1))
    assert torch.equal(columns[:, rows], full.t()[:, rows])


def test_padding_must_be_declared():
    local = torch.zeros(10)
    with pytest.raises(LayoutError, match="padding=True"):
        Sharded(local, (3, 3), flat=(0, 9))
    assert Sharded(local, (3, 3), flat=(0, 9), padding=True).pieces[0].size == 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offset": (0, 0), "flat": (0, 4)},
        {"offset": (0,)},
        {"offset": (4, 0)},
        {"offset": (-1, 0)},
        {"offset": ("a", 0)},
        {"offset": None, "dim": 0},
        {"flat": (0, 5)},
        {"flat": (3, 2)},
        {"flat": (20, 24)},
        {"flat": (0, 4), "within": ((4, 4), (2, 2))},
        {"parts": [((0, 0), (1, 2))]},
        {"parts": [((0, 0), (2, 2)), ((0, 0), (2, 2))]},
        {"parts": [((0, 0), (1, 2)), ((0, 1), (1, 2))]},
        {"parts": [((0, 0), (1, 2)), ((1, 0), (1, 2))], "dim": 1},
        {"parts": [((0, 0), (1, 2)), ((1, 0), (1, 2))], "dim": 5},
        {"parts": [((5, 5), (2, 2))]},
        {"layout": Irregular(())},
    ],
    ids=str,
)
def test_declarations_that_do_not_fit_are_refused(options):
    with pytest.raises(LayoutError):
        Sharded(torch.zeros(2, 2), (5, 4), **options)


def test_sharded_needs_a_tensor():
    with pytest.raises(LayoutError, match="needs a tensor"):
        Sharded([1.0], (1,), offset=(0,))


def test_hand_sharded_state_is_saved_and_resharded():
    full = indices(6, 4)
    cuts = ((0, 1), (1, 4), (4, 6), (6, 6))
    rows = [Sharded(full[start:stop].clone(), (6, 4), offset=(start, 0)) for start, stop in cuts]
    saved = MemoryCheckpoint(*(flatten({"w": part}, random=False) for part in rows))
    assert torch.equal(saved.tensor("w"), full)
    flat = Sharded(torch.zeros(9), (6, 4), flat=(10, 19))
    saved.restore({"w": flat}, random=False)
    assert flat.tensor.tolist() == list(range(10, 19))
    whole = torch.zeros(6, 4)
    saved.restore({"w": whole}, random=False)
    assert torch.equal(whole, full)
    with pytest.raises(StateMismatch, match=r"w: shape \(6, 4\) in the checkpoint, \(6, 5\) live"):
        saved.restore({"w": Sharded(torch.zeros(1, 5), (6, 5), offset=(0, 0))})


def test_optimizer_state_of_a_hand_sharded_parameter_follows_it():
    def make(value: float) -> dict[str, object]:
        weight = nn.Parameter(torch.full((2, 4), value))
        return {"w": Sharded(weight, (6, 4), offset=(2, 0)), "optim": torch.optim.Adam([weight])}

    source, target = make(1.0), make(2.0)
    weight = source["w"].tensor
    weight.grad = indices(2, 4)
    source["optim"].step()
    saved = save(source)
    assert saved.data["optim.w.exp_avg"].shape == (6, 4)
    saved.restore(target)
    other = target["w"].tensor
    assert torch.equal(target["optim"].state[other]["exp_avg"], source["optim"].state[weight]["exp_avg"])
    assert torch.equal(weight, other)


# DTensors: a fake process group plays one rank after another


def local_part(full: torch.Tensor, mesh, placements) -> torch.Tensor:
    """What a rank holds, by torch's own chunking applied axis by axis (strided shards aside)."""
    local = full
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            count, index = mesh.size(axis), mesh.get_local_rank(axis)
            chunks = list(torch.chunk(local, count, placement.dim))
            empty = local.narrow(placement.dim, 0, 0)
            local = chunks[index] if index < len(chunks) else empty
    return local.clone()


def as_dtensor(full: torch.Tensor, mesh, placements) -> DTensor:
    local = local_part(full, mesh, placements)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


MESHES = [((4,), ("a",)), ((2, 2), ("a", "b")), ((2, 1, 3), ("a", "b", "c"))]
PLACEMENTS = [Replicate(), Shard(0), Shard(1), Shard(-1)]


@pytest.mark.parametrize(("shape", "axes"), MESHES)
def test_every_placement_of_dtensors(as_rank, shape, axes):
    world = torch.Size(shape).numel()
    full = indices(5, 7)
    combinations = list(itertools.product(PLACEMENTS, repeat=len(shape)))
    flats: dict[object, list[object]] = {placements: [] for placements in combinations}
    for rank in range(world):
        as_rank(rank, world)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        for placements in combinations:
            tensor = as_dtensor(full, mesh, placements)
            flats[placements].append(flatten({"t": tensor, "s": torch.ones(2)}, random=False))
    for placements, ranks in flats.items():
        assert torch.equal(MemoryCheckpoint(*ranks).tensor("t"), full), placements
        assert len({flat.structure_key for flat in ranks}) == 1
        assert all(isinstance(flat.tensors[0].sharding, Sharding) for flat in ranks)


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(1), Replicate()), (Shard(0), Shard(0))])
def test_dtensors_are_restored_into_any_layout(as_rank, placements):
    full = indices(5, 7)
    saved = save({"t": full})
    for rank in range(4):
        as_rank(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
        live = as_dtensor(torch.zeros(5, 7), mesh, placements)
        saved.restore({"t": live}, random=False)
        assert torch.equal(live.to_local(), local_part(full, mesh, placements))


class Holder:
    """Gives and takes a state dict of DTensors, as an object around torch's distributed state dicts does."""

    def __init__(self, tensor: DTensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, object]:
        return {"deep": [self.tensor], "n": 1}

    def load_state_dict(self, state: dict[str, object]) -> None:
        (self.tensor,) = state["deep"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_object_gets_back_dtensors_as_it_gave_them(as_rank, dtype):
    flats, full = [], indices(5, 7)
    for rank in range(2):
        as_rank(rank, 2)
        mesh = init_device_mesh("cpu", (2,))
        flats.append(flatten({"h": Holder(as_dtensor(full, mesh, (Shard(0),)))}, random=False))
    saved = MemoryCheckpoint(*flats)
    for rank in range(4):
        as_rank(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
        given = as_dtensor(torch.zeros(5, 7, dtype=dtype), mesh, (Replicate(), Shard(1)))
        holder = Holder(given)
        saved.restore({"h": holder}, random=False)
        assert isinstance(holder.tensor, DTensor)
        assert holder.tensor is not given
        assert (holder.tensor.placements, holder.tensor.device_mesh) == (given.placements, mesh)
        assert torch.equal(holder.tensor.to_local(), local_part(full, mesh, given.placements))
    plain = Holder(torch.zeros(5, 7))
    saved.restore({"h": plain}, random=False)
    assert torch.equal(plain.tensor, full)


def test_a_submesh_numbers_its_ranks_globally(as_rank):
    as_rank(3, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    (leaf,) = flatten({"t": as_dtensor(indices(4, 2), mesh["tp"], (Shard(0),))}, random=False).tensors
    assert leaf.sharding.mesh.all_ranks().tolist() == [2, 3]
    assert leaf.pieces[0].box.offsets == (2, 0)


def test_fsdp_over_tensor_parallel(as_rank):
    from torch.distributed.tensor.placement_types import _StridedShard

    flats = []
    full = indices(10, 3)
    for rank in range(4):
        as_rank(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel = list(torch.chunk(full, 2, 0))[rank % 2]
        local = list(torch.chunk(tensor_parallel, 2, 0))[rank // 2].clone()
        placements = (_StridedShard(0, split_factor=2), Shard(0))
        tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
        flats.append(flatten({"t": tensor}, random=False))
    assert torch.equal(MemoryCheckpoint(*flats).tensor("t"), full)


def test_a_pending_reduction_is_refused(as_rank):
    as_rank(0, 2)
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(2), mesh, (Partial(),), run_check=False)
    with pytest.raises(UnsupportedValue, match=r"'t' is a DTensor with a pending .*redistribute"):
        flatten({"t": tensor}, random=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def fully_sharded(rank: int, world: int, full: nn.Module) -> nn.Module:
    """A module whose parameters are DTensors, as FSDP2 makes them."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    module = Block()
    for name, parameter in full.named_parameters():
        owner, _, key = name.rpartition(".")
        made = nn.Parameter(as_dtensor(parameter.detach(), mesh, (Shard(0),)))
        setattr(module.get_submodule(owner), key, made)
    return module


def test_optimizer_state_follows_sharded_parameters_and_is_made_fresh(as_rank):
    torch.manual_seed(0)
    full = Block()
    optimizer = torch.optim.AdamW(full.parameters())
    full(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    saved = save({"model": full, "optim": optimizer})
    flats = []
    for rank in range(4):
        as_rank(rank, 4)
        module = fully_sharded(rank, 4, Block())
        fresh = torch.optim.AdamW(module.parameters())
        saved.restore({"model": module, "optim": fresh}, random=False)
        for name, parameter in module.named_parameters():
            state = fresh.state[parameter]
            whole = full.get_parameter(name)
            assert isinstance(state["exp_avg"], DTensor)
            assert state["exp_avg"].placements == parameter.placements
            assert state["exp_avg"].shape == whole.shape
            assert not isinstance(state["step"], DTensor)
            expected = local_part(optimizer.state[whole]["exp_avg"], parameter.device_mesh, parameter.placements)
            assert torch.equal(state["exp_avg"].to_local(), expected)
        flats.append(flatten({"model": module, "optim": fresh}, random=False))
    again = MemoryCheckpoint(*flats)
    assert all(torch.equal(again.data[name], saved.data[name]) for name in saved.data)


def test_plain_state_in_the_shape_of_the_local_shard_follows_the_layout(as_rank):
    as_rank(1, 2)
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(as_dtensor(indices(6, 2), mesh, (Shard(0),)))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"velocity": torch.zeros(3, 2), "row": torch.zeros(6), "count": torch.zeros(())}
    leaves = {leaf.name: leaf for leaf in flatten({"p": parameter, "o": optimizer}, random=False).tensors}
    assert leaves["o.p.velocity"].global_shape == (6, 2)
    assert leaves["o.p.velocity"].pieces[0].box.offsets == (3, 0)
    assert leaves["o.p.row"].sharding is None
    assert leaves["o.p.count"].sharding is None


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_after_an_eval_forward(as_rank):
    from torch.distributed.fsdp import fully_shard

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = Block()
        fully_shard(module.up)
        fully_shard(module, reshard_after_forward=False)
        return module, torch.optim.Adam(module.parameters())

    as_rank(0, 2)
    module, optimizer = make()
    module(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    state = {"model": module, "optim": optimizer}
    before = flatten(state, random=False)
    walker = Walker(state, random=False)
    assert walker.flatten().structure_key == before.structure_key
    with torch.no_grad():
        module.eval()(torch.ones(2, 6))
    assert not all(isinstance(parameter, DTensor) for parameter in module.parameters())
    again = walker.flatten()
    assert again.structure_key == before.structure_key == flatten(state, random=False).structure_key
    leaves = {leaf.name: leaf for leaf in again.tensors}
    assert leaves["model.up.weight"].pieces[0].box.shape == (3, 6)
    assert leaves["model.up.weight"].owners == (id(optimizer),)
    parameters = [name for name, leaf in leaves.items() if leaf.role == "parameter"]
    assert parameters == ["model.up.weight", "model.up.bias", "model.down.weight"]
    other, fresh = make()
    MemoryCheckpoint(again).restore({"model": other, "optim": fresh}, random=False)
    assert torch.equal(other.up.weight.to_local(), module.up.weight.to_local())
    assert torch.equal(
        fresh.state[other.up.weight]["exp_avg"].to_local(), optimizer.state[module.up.weight]["exp_avg"].to_local()
    )
