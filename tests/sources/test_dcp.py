"""torch.distributed.checkpoint: every layout that torch writes, and damage to each kind of file."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckptengine.errors import CheckpointError, Damaged, NotFound, Truncated, UnreadableFormat
from ckptengine.operations.convert import convert
from ckptengine.operations.read import read_tensor
from ckptengine.sources.dcp.metadata import read_metadata
from ckptengine.sources.dcp.source import DcpItems, canonical_names
from ckptengine.sources.detect import open_source
from ckptengine.sources.files import LocalFiles

from . import make_dcp
from .trees import counting, holds

EXTRA = {"epoch": 3, "names": ["a", {"b": 2.5}], "none": None}


def save(state: dict[str, Any], path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of two ranks, written by two real processes."""
    out = tmp_path_factory.mktemp("layouts")
    make_dcp.make(TWO_RANKS, out)
    return out


TWO_RANKS = [case for case, (world, *_) in make_dcp.CASES.items() if world == 2]


@pytest.mark.parametrize("case", TWO_RANKS)
def test_what_real_ranks_wrote(layouts: Path, case: str) -> None:
    source = open_source(layouts / case / "checkpoint")
    assert source.format == "dcp"
    holds(source, torch.load(layouts / case / "truth.pt"))
    values: Any = source.values()
    assert values["extra"] == EXTRA
    if case != "fsdp2_flat":
        assert [group["lr"] for group in values["optim"]["param_groups"]][:1] == [0.01]
        assert any("emb.weight" in group["params"] for group in values["optim"]["param_groups"])


@pytest.mark.parametrize("kind", list(dcp.filesystem.SerializationFormat))
def test_one_process(tmp_path: Path, kind: Any) -> None:
    tensors = {
        "plain": counting(5, 3),
        "half": counting(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    nested = {"deep": {"list": [counting(2, 2), {"x": counting(3)}], "text": "t", "": 1}, "number": 5}
    save(tensors | nested, tmp_path, serialization_format=kind)
    source = open_source(tmp_path)
    holds(source, tensors | {"deep.list.0": counting(2, 2), "deep.list.1.x": counting(3)})
    assert source.values() == {"deep": {"list": [None, None], "text": "t", "": 1}, "number": 5}


def test_a_lazy_view_is_named_as_one(tmp_path: Path) -> None:
    """torch writes its bytes as they lie, before they are conjugated: nothing is damaged."""
    save({"w": torch.complex(counting(3), counting(3)).conj()}, tmp_path)
    with pytest.raises(UnreadableFormat, match=r"chunk of 'w' is a torch.Tensor as a lazy view \(conj\).*resolve"):
        open_source(tmp_path).tensor("w")


def test_a_transposed_tensor_keeps_its_strides(tmp_path: Path) -> None:
    save({"w": counting(5, 3).t()}, tmp_path)
    source = open_source(tmp_path)
    assert source.tensor("w").fragments[0].strides == (1, 3)
    holds(source, {"w": counting(5, 3).t()})


def test_items_alike_are_read_without_their_zips_directories(tmp_path: Path) -> None:
    """Of tensors of one type and shape the first is read in full; the others where their own bytes say the same."""
    tensors = {f"w{n}": counting(6, 6, start=100 * n) for n in range(4)}
    tensors |= {"turned": counting(6, 6, start=7).t(), "after": counting(6, 6, start=900)}
    tensors |= {"whole": counting(6, 6).to(torch.int32), "complex": torch.complex(counting(3, 6), counting(3, 6))}
    save(tensors, tmp_path)
    holds(open_source(tmp_path), tensors)
    counted = Counted(str(tmp_path))
    items, records = DcpItems(counted), read_metadata(counted).tensors
    reads = []
    for name in ("w0", "w1", "turned", "w2"):
        before = counted.reads
        fragment = items.fragment(name, records[name], records[name].chunks[0])
        assert fragment.strides == ((1, 6) if name == "turned" else None)
        reads.append(counted.reads - before)
    assert reads[1] == reads[3] == 2 < reads[2]


@pytest.mark.parametrize("place", ["head", "end"])
def test_an_item_that_is_not_like_the_others_is_read_in_full(tmp_path: Path, place: str) -> None:
    """A damaged head or end of one of many items alike is found, however many were in order before it."""
    save({f"w{n}": counting(6, 6, start=100 * n) for n in range(3)}, tmp_path)
    items = [record.chunks[0].item for record in read_metadata(LocalFiles(str(tmp_path))).tensors.values()]
    last = max((item for item in items if item is not None), key=lambda item: item.offset)
    data = bytearray((tmp_path / last.path).read_bytes())
    at = last.offset + 64 if place == "head" else last.offset + last.nbytes - 22
    data[at : at + 4] = b"none"
    (tmp_path / last.path).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"__0_0\.distcp at byte {last.offset}"):
        read_all(tmp_path)


class Counted(LocalFiles):
    """Counts its reads."""

    reads = 0

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        self.reads += 1
        return super().read(path, offset, nbytes)


def test_names_of_optimizers() -> None:
    tensors = ["optim.state.w.exp_avg", "a.state.x", "net.optim.state.w.step", "model.state.w", "model.w"]
    objects = ["optim.param_groups.0.lr", "net.optim.param_groups.0.lr"]
    assert canonical_names(tensors, objects) == {
        "optim.w.exp_avg": "optim.state.w.exp_avg",
        "a.state.x": "a.state.x",
        "net.optim.w.step": "net.optim.state.w.step",
        "model.state.w": "model.state.w",
        "model.w": "model.w",
    }
    taken = canonical_names(["o.state.w", "o.w"], ["o.param_groups.0.lr"])
    assert taken == {"o.state.w": "o.state.w", "o.w": "o.w"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save({"a": counting(40), "b": counting(3, 3), "note": [1, 2]}, tmp_path / "x")
    return tmp_path / "x"


def read_all(path: Path) -> None:
    source = open_source(path)
    for name in source.names():
        read_tensor(source, source.tensor(name))
    source.values()


def test_a_missing_data_file_is_named(saved: Path) -> None:
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(NotFound, match=r"__0_0\.distcp.*fetch"):
        open_source(saved).tensor("a")


def test_missing_metadata_is_no_checkpoint(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(UnreadableFormat, match="no checkpoint of a known format"):
        open_source(saved)
    with pytest.raises(NotFound, match="not finished"):
        read_metadata(LocalFiles(str(saved)))


def test_a_file_of_another_checkpoint_is_found(saved: Path, tmp_path: Path) -> None:
    save({"a": counting(41), "b": counting(3, 3), "note": [1, 2]}, tmp_path / "y")
    shutil.copy(tmp_path / "y" / "__0_0.distcp", saved / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        read_all(saved)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_every_truncation_is_an_error(saved: Path, name: str) -> None:
    data = (saved / name).read_bytes()
    for length in range(0, len(data) - 1, 41):
        (saved / name).write_bytes(data[:length])
        with pytest.raises((Damaged, Truncated, UnreadableFormat)):
            read_all(saved)


def test_damaged_metadata_raises_nothing_else(saved: Path) -> None:
    data = bytearray((saved / ".metadata").read_bytes())
    for position in range(0, len(data), 3):
        data[position] ^= 0x41
        (saved / ".metadata").write_bytes(data)
        data[position] ^= 0x41
        with contextlib.suppress(CheckpointError):
            read_all(saved)


def test_other_pickles_are_refused(tmp_path: Path) -> None:
    for value in ({"a": 1}, [1], None):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
        with pytest.raises(UnreadableFormat, match="not the metadata"):
            open_source(tmp_path)


def test_extensions_are_refused(saved: Path) -> None:
    with open(saved / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]
    with open(saved / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(UnreadableFormat, match=r"stream\.zstd"):
        open_source(saved)


def test_a_chunk_without_a_file_is_damage(saved: Path) -> None:
    with open(saved / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "b"}
    with open(saved / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(Damaged, match="'b'"):
        open_source(saved)


@pytest.mark.filterwarnings("ignore")
def test_megatrons_folder_of_fsdp(tmp_path: Path) -> None:
    """``fsdp_dtensor`` is DCP under Megatron's names of folders, without the ``metadata.json`` of torch_dist."""
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    state = {"model": {"decoder.w": torch.arange(6.0)}, "iteration": 5}
    save(state, folder)
    source = open_source(tmp_path)
    assert (source.format, source.step) == ("dcp", 5)
    holds(source, {"model.decoder.w": torch.arange(6.0)})


class Kept:
    def __init__(self) -> None:
        self.t, self.half, self.k = torch.arange(3.0), torch.full((2,), 1.5, dtype=torch.bfloat16), 4


def test_tensors_inside_of_objects_are_values_and_come_back_as_tensors(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"w": torch.ones(2), "kept": Kept(), "mixed": [1, (torch.ones(2, dtype=torch.int16), "x")]}
        dcp.save(state, checkpoint_id=tmp_path / "in", no_dist=True)
    for path in (tmp_path / "in", tmp_path / "out"):
        values: Any = open_source(path).values()
        kept = values["kept"]["state"]
        assert kept["k"] == 4
        assert (kept["t"]["dtype"], kept["t"]["data"].tolist()) == ("torch.float32", [0.0, 1.0, 2.0])
        assert (kept["half"]["dtype"], kept["half"]["data"].tolist()) == ("torch.bfloat16", [0x3FC0] * 2)
        assert values["mixed"][1][0]["data"].tolist() == [1, 1]
        if path.name == "in":
            convert(path, tmp_path / "out", to="dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "out", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(back["kept"]["state"]["half"], torch.full((2,), 1.5, dtype=torch.bfloat16))
    assert torch.equal(back["mixed"][1][0], torch.ones(2, dtype=torch.int16))


def test_a_large_tensor_inside_of_an_object_is_not_lost_silently(tmp_path: Path) -> None:
    kept = Kept()
    kept.t = torch.zeros(1 << 19)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2), "kept": kept}, checkpoint_id=tmp_path / "in", no_dist=True)
    source = open_source(tmp_path / "in")
    holds(source, {"w": torch.ones(2)})
    with pytest.raises(UnreadableFormat, match=r"value 'kept': .*float32 \[524288\] in it, too large for a value"):
        source.values()
