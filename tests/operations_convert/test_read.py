"""`read_box` against numpy, over fragments cut, permuted and scattered in every way that a fragment can say."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import DigestMismatch, LayoutError, Truncated, UnusableRequest
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.operations import read
from ckptengine.operations.read import BoxReader, read_box, read_tensor
from tests.operations_convert.memory_source import MemorySource

UNITS = {1: ("uint8", "u1"), 2: ("bfloat16", "u2"), 4: ("float32", "u4"), 8: ("float64", "u8")}


def index_valued(shape: tuple[int, ...], unit: str) -> np.ndarray:
    """Each element holds its own global linear index, modulo the unit's range."""
    return np.arange(1, math.prod(shape) + 1, dtype=np.uint64).astype(unit).reshape(shape)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[MemorySource, LogicalTensor, np.ndarray]:
    """A tensor cut into boxes; each box stored in some file in some order of its dimensions, with padding around."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    dtype, unit = draw(st.sampled_from(sorted(UNITS.values())))
    truth = index_valued(shape, unit)
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        cuttable = [d for d in range(box.ndim) if box.shape[d] > 1]
        if not cuttable:
            boxes.append(box)
            continue
        d = draw(st.sampled_from(cuttable))
        at = draw(st.integers(1, box.shape[d] - 1))
        low = Box(box.offsets, (*box.shape[:d], at, *box.shape[d + 1 :]))
        boxes += [low, *box.subtract(low)]
    files: dict[str, bytearray] = {"a.bin": bytearray(), "b.bin": bytearray()}
    fragments = []
    for box in draw(st.permutations(boxes)):
        data = truth[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
        order = draw(st.permutations(range(box.ndim)))
        stored = np.ascontiguousarray(data.transpose(order))
        name = draw(st.sampled_from(sorted(files)))
        files[name] += b"\xee" * draw(st.integers(0, 9))
        packed = row_major_strides(stored.shape)
        strides = tuple(packed[order.index(d)] for d in range(box.ndim))
        plain = list(order) == sorted(order)
        fragments.append(Fragment(box, name, len(files[name]), None if plain else strides))
        files[name] += stored.tobytes()
    tensor = LogicalTensor("t", dtype, shape, fragments)
    return MemorySource({k: bytes(v) for k, v in files.items()}, [tensor]), tensor, truth


@given(cut_tensors(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_box_of_any_cut_equals_numpy(
    cut: tuple[MemorySource, LogicalTensor, np.ndarray], data: st.DataObject
) -> None:
    source, tensor, truth = cut
    bounds = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in tensor.shape]
    box = Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))
    wanted = truth[tuple(slice(a, b) for a, b in bounds)]
    out = np.full(box.shape, 0xEE, truth.dtype)
    read_box(source, tensor, box, out)
    np.testing.assert_array_equal(out, wanted)
    flat = bytearray(wanted.nbytes)
    read_box(source, tensor, box, flat)
    assert bytes(flat) == wanted.tobytes()
    wide = np.zeros((*box.shape, 2), truth.dtype)
    read_box(source, tensor, box, wide[..., 1])
    np.testing.assert_array_equal(wide[..., 1], wanted)
    assert not wide[..., 0].any()


@given(cut_tensors())
@settings(max_examples=60, deadline=None)
def test_small_blocks_and_threads_change_nothing(cut: tuple[MemorySource, LogicalTensor, np.ndarray]) -> None:
    source, tensor, truth = cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "SCRATCH_BYTES", 24)
        patch.setattr(read, "BLOCK_BYTES", 16)
        patch.setattr(read, "GAP_BYTES", 3)
        patch.setattr(read, "PARALLEL_BYTES", 1)
        np.testing.assert_array_equal(read_tensor(source, tensor).view(truth.dtype), truth)


def test_interleaved_and_repeated_storage() -> None:
    stored = np.arange(24, dtype="<u4").reshape(4, 3, 2)  # rows x {q, k, v} x columns
    fragments = [Fragment(Box.whole((4, 2)), "f", 1 * 2 * 4, (6, 1))]
    source = MemorySource({"f": stored.tobytes()}, [LogicalTensor("k", "float32", (4, 2), fragments)])
    np.testing.assert_array_equal(read_tensor(source, source.tensor("k")), stored[:, 1])
    repeated = LogicalTensor("step", "float32", (5, 3), [Fragment(Box.whole((5, 3)), "f", 8, (0, 0))])
    np.testing.assert_array_equal(read_tensor(source, repeated), np.full((5, 3), 2, "u4"))


def test_every_stored_byte_is_read_once_for_a_whole_tensor() -> None:
    truth = np.arange(64 * 33, dtype="<u4").reshape(64, 33)
    halves = {"left": truth[:, :17].tobytes(), "right": np.ascontiguousarray(truth[:, 17:].T).tobytes()}
    fragments = [
        Fragment(Box((0, 0), (64, 17)), "left", 0),
        Fragment(Box((0, 17), (64, 16)), "right", 0, (1, 64)),
    ]
    source = MemorySource(halves, [LogicalTensor("t", "float32", (64, 33), fragments)])
    np.testing.assert_array_equal(read_tensor(source, source.tensor("t")), truth)
    assert source.files.bytes_read == truth.nbytes
    assert len(source.files.reads) == 2


def test_a_slice_reads_little_more_than_it_needs() -> None:
    truth = np.arange(256 * 4096, dtype="<u4").reshape(256, 4096)
    tensor = LogicalTensor("t", "int32", truth.shape, [Fragment(Box.whole(truth.shape), "f", 0)])
    source = MemorySource({"f": truth.tobytes()}, [tensor])
    out = np.empty((256, 16), "u4")
    read_box(source, source.tensor("t"), Box((0, 100), (256, 16)), out)
    np.testing.assert_array_equal(out, truth[:, 100:116])
    assert source.files.bytes_read == out.nbytes
    rows = np.empty((3, 4096), "u4")
    source.files.reads.clear()
    read_box(source, source.tensor("t"), Box((7, 0), (3, 4096)), rows)
    assert source.files.reads == [("f", 7 * 4096 * 4, rows.nbytes)]


def test_runs_that_continue_each_other_are_one_read() -> None:
    truth = np.arange(10 * 10, dtype="<u4").reshape(10, 10)
    fragments = [  # a flat range as boxes: tail of a row, whole rows, head of a row
        Fragment(Box((0, 0), (1, 10)), "f", 0),
        Fragment(Box((1, 0), (8, 10)), "f", 40),
        Fragment(Box((9, 0), (1, 4)), "f", 360),
        Fragment(Box((9, 4), (1, 6)), "f", 376),
    ]
    source = MemorySource({"f": truth.tobytes()}, [LogicalTensor("t", "int32", (10, 10), fragments)])
    np.testing.assert_array_equal(read_tensor(source, source.tensor("t")), truth)
    assert source.files.reads == [("f", 0, 400)]


@pytest.mark.parametrize(
    ("boxes", "word"), [([Box((0,), (3,))], "gap"), ([Box((0,), (4,)), Box((2,), (3,))], "overlap")]
)
def test_fragments_that_do_not_cover_are_refused(boxes: list[Box], word: str) -> None:
    tensor = LogicalTensor("t", "uint8", (5,), [Fragment(box, "f", 0) for box in boxes])
    with pytest.raises(LayoutError, match=f"'t'.*{word}"):
        read_tensor(MemorySource({"f": bytes(9)}, [tensor]), tensor)


def test_gap_and_overlap_that_cancel_out_are_refused() -> None:
    boxes = [Box((0,), (2,)), Box((1,), (2,)), Box((4,), (1,))]
    tensor = LogicalTensor("t", "uint8", (5,), [Fragment(box, "f", 0) for box in boxes])
    with pytest.raises(LayoutError, match="'t'"):
        read_tensor(MemorySource({"f": bytes(9)}, [tensor]), tensor)


def test_fragments_with_an_index_of_their_own_are_asked_by_box() -> None:
    class Indexed(list[Fragment]):
        asked: list[Box] = []  # noqa: RUF012

        def overlapping(self, box: Box) -> list[Fragment]:
            self.asked.append(box)
            return [f for f in self if f.box.intersect(box)]

    fragments = Indexed(Fragment(Box((i,), (1,)), "f", i) for i in range(9))
    tensor = LogicalTensor("t", "uint8", (9,), fragments)
    out = bytearray(3)
    read_box(MemorySource({"f": bytes(range(9))}, [tensor]), tensor, Box((4,), (3,)), out)
    assert out == bytes([4, 5, 6])
    assert fragments.asked == [Box((4,), (3,))]


def test_a_source_that_verifies_is_asked_to() -> None:
    class Verified(MemorySource):
        def read_verified(self, path: str, offset: int, view: memoryview) -> None:
            raise DigestMismatch(f"{path}: granule {offset} is damaged")

    tensor = LogicalTensor("t", "uint8", (5,), [Fragment(Box.whole((5,)), "f", 0)])
    with pytest.raises(DigestMismatch, match="f:"):
        read_tensor(Verified({"f": bytes(5)}, [tensor]), tensor)


def test_targets_that_do_not_fit_are_refused() -> None:
    tensor = LogicalTensor("t", "float32", (4, 2), [Fragment(Box.whole((4, 2)), "f", 0)])
    source = MemorySource({"f": bytes(32)}, [tensor])
    frozen = np.zeros((4, 2), "u4")
    frozen.flags.writeable = False
    for out in (np.zeros((2, 4), "u4"), np.zeros((4, 2), "u2"), frozen, bytearray(31), memoryview(bytes(32))):
        with pytest.raises(UnusableRequest, match="'t'"):
            read_box(source, tensor, Box.whole((4, 2)), out)
    with pytest.raises(UnusableRequest, match="not inside"):
        read_box(source, tensor, Box((3, 0), (2, 2)), bytearray(16))


def test_a_short_file_surfaces_from_threads() -> None:
    tensor = LogicalTensor("t", "uint8", (64 << 20,), [Fragment(Box.whole((64 << 20,)), "f", 0)])
    source = MemorySource({"f": bytes((64 << 20) - 1)}, [tensor])
    with pytest.raises(Truncated, match="f:"):
        read_tensor(source, tensor, workers=4)


def test_memory_beside_the_target_is_bounded() -> None:
    rows, columns = 2048, 4096  # 32 MiB, stored transposed
    tensor = LogicalTensor("t", "float32", (rows, columns), [Fragment(Box.whole((rows, columns)), "f", 0, (1, rows))])
    stored = np.arange(rows * columns, dtype="<u4").reshape(columns, rows)
    source = MemorySource({"f": b""}, [tensor])
    flat = stored.reshape(-1).view("u1")

    def read_into(path: str, offset: int, view: memoryview) -> None:
        view[:] = flat[offset : offset + len(view)].data

    source.files.read_into = read_into  # type: ignore[method-assign]
    out = np.empty((rows, columns), "u4")
    tracemalloc.start()
    read_box(source, tensor, Box.whole(tensor.shape), out, workers=2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(out, stored.T)
    assert peak_bytes < 3 * read.SCRATCH_BYTES


def test_many_fragments_and_many_boxes_stay_cheap() -> None:
    count = 4000
    fragments = [Fragment(Box((i, 0), (1, 8)), "f", i * 8) for i in range(count)]
    tensor = LogicalTensor("t", "uint8", (count, 8), fragments)
    truth = np.arange(count * 8, dtype=np.uint64).astype("u1").reshape(count, 8)
    source = MemorySource({"f": truth.tobytes()}, [tensor])
    reader = BoxReader(source, tensor)
    out = np.empty((4, 8), "u1")
    for start in range(0, count, 40):
        reader.read(Box((start, 0), (4, 8)), out)
        np.testing.assert_array_equal(out, truth[start : start + 4])
    assert len(source.files.reads) == count // 40
