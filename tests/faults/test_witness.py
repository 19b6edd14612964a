"""Writes that no counter tells of, before their bytes are captured: what the witnesses find, and what they leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.errors import SaveFailed, Stalled, TornCapture
from ckptengine.snapshot import capture, streams
from ckptengine.snapshot.register import Registrar
from ckptengine.snapshot.witness import Watched
from ckptengine.state.walker import Walker

from .test_guard import Held, latch  # noqa: F401 (a fixture)

WITHIN_S = 60.0
ENGINES = pytest.mark.parametrize("library", [native.host_memory.library, None], ids=["default", "portable"])


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    return lambda library: monkeypatch.setattr(native.host_memory, "library", library)


def watched(*sizes: int) -> tuple[list[torch.Tensor], Watched]:
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    return tensors, Watched(tensors)


def flipped(watch: Watched, octets: torch.Tensor, place: int) -> bool:
    """Whether a byte that changes after registration, as no counter sees it, is found."""
    taken = watch.take()
    octets.numpy()[place] ^= 1
    return bool(len(taken.belied(np.arange(len(taken.words)))))


@ENGINES
def test_any_byte_of_a_small_tensor(portable: Callable[[object], None], library: object) -> None:
    portable(library)
    tensors, watch = watched(1, 7, 64, 1000, 4096)
    for octets in tensors:
        for place in {0, len(octets) // 2, len(octets) - 1}:
            assert flipped(watch, octets, place)
    assert not len(watch.take().belied(np.arange(5)))


@ENGINES
def test_other_places_of_a_large_tensor_in_every_save(portable: Callable[[object], None], library: object) -> None:
    """A byte is found in some saves and not in others: every place is looked at in the end, and none always."""
    portable(library)
    (octets,), watch = watched(3 << 20)
    watch._whole_bytes = 0  # else it is small enough
    octets = octets[: 1 << 14]
    watch._sizes[0] = len(octets)
    for place in (0, 5000, len(octets) - 1):
        found = [flipped(watch, octets, place) for _ in range(600)]
        assert 0 < sum(found) < 600, place


@ENGINES
def test_half_of_a_large_tensor(portable: Callable[[object], None], library: object) -> None:
    """The rows of some experts, say, whole parts of which are written: always found."""
    portable(library)
    (octets,), watch = watched(5 << 20)
    for begin in range(0, 3 << 20, 300_001):
        taken = watch.take()
        octets.numpy()[begin : begin + (5 << 19)] ^= 1  # as 4 lines of the portable path cut it
        assert taken.belied(np.arange(1)).tolist() == [0]


def test_the_smallest_are_digested_whole_and_all_together_stay_bounded() -> None:
    _, watch = watched(*[100] * 50, 3 << 20, 4 << 20)
    assert 100 <= watch._whole_bytes < 3 << 20
    few = Watched([torch.zeros(200)])
    assert few._whole_bytes >= 800
    many = torch.zeros(1).expand(1)
    assert Watched([many] * 300_000)._lines == 1


def test_what_lies_with_gaps_is_left_out_and_what_is_turned_is_not() -> None:
    base = torch.zeros(40, 30)
    watch = Watched([base[:, :7], base.t(), base[0].expand(5, 30)])
    taken = watch.take()
    base.numpy()[:] = 1
    assert taken.belied(np.arange(3)).tolist() == [1]


def test_one_element_of_a_small_tensor_before_it_is_captured(tmp_path: Path, latch: Held) -> None:  # noqa: F811
    state = {"first": torch.zeros(5000), "small": torch.zeros(900)}
    with ce.Checkpointer(state, tmp_path, file_ops=latch, on_failure=ce.Tolerate(), random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        latch.shut()
        handle = checkpointer.save(2)
        assert latch.reached.wait(WITHIN_S)
        state["small"].numpy()[899] = 1
        latch.open()
        error = handle.exception(WITHIN_S)
        assert isinstance(error, TornCapture)
        assert "small" in str(error)
    assert ce.steps(tmp_path) == [1]


def registered(state: dict[str, torch.Tensor]) -> tuple[capture.LazySet, list[int], object]:
    flat = Walker(state, random=False).flatten()
    known = Registrar().register(flat.tensors)
    lazy = capture.LazySet(list(range(len(flat.tensors))), list(flat.tensors), known.rows)
    return lazy, known.versions, known.witnesses


class FailingJob:
    """A job on a device that fails, or that is not in time; it notes what is asked of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.capture: capture.Capture
        self.seen: list[object] = []

    def wait_captured(self, extents: object = None, timeout_s: float | None = None) -> bool:
        if self.error is not None:
            raise self.error
        return False

    def stop(self) -> None:
        self.seen.append(self.capture.error)

    def recheck(self, extents: object, samples: int | None) -> list[int]:
        raise AssertionError("what is void is not looked at")


def test_a_device_that_fails_at_the_fence_fails_the_save_and_not_the_training() -> None:
    taken = capture.Capture(FailingJob(RuntimeError("device lost")), *registered({"t": torch.zeros(9)}))  # type: ignore[arg-type]
    taken.fence(None, None)
    assert isinstance(taken.error, SaveFailed)
    assert "device lost" in str(taken.error)
    assert taken.released
    taken.fence(None, None)  # no further wait


def test_who_hears_that_a_job_was_stopped_hears_why() -> None:
    job = FailingJob()
    job.capture = taken = capture.Capture(job, *registered({"t": torch.zeros(9)}))  # type: ignore[arg-type]
    taken.fence(None, 0.01)
    assert isinstance(taken.error, Stalled)
    assert job.seen == [taken.error]
    assert taken.released


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_a_stalled_native_save_does_not_wait_for_its_last_write(tmp_path: Path) -> None:
    state = {"big": torch.zeros(3 << 20)}
    try:
        with ce.Checkpointer(
            state, tmp_path, stall_budget_s=0.05, on_failure=ce.Tolerate(), random=False, arena_bytes=4 << 20
        ) as checkpointer:
            native.arm_fault("write", sticky=True, delay_s=1.5)
            handle = checkpointer.save(1)
            time.sleep(0.2)  # the first writes are under way
            begun_s = time.monotonic()
            checkpointer.fence()
            blocked_s = time.monotonic() - begun_s
            native.disarm_faults()
            assert isinstance(handle.exception(WITHIN_S), Stalled)
    finally:
        native.disarm_faults()
    assert blocked_s < 0.8
    assert ce.steps(tmp_path) == []


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_a_cap_that_a_fence_lifts_is_not_made_up_for(tmp_path: Path) -> None:
    """At 4 MiB/s the first save alone would owe five seconds."""
    state = {"t": torch.zeros(5 << 20)}
    with ce.Checkpointer(state, tmp_path, random=False, max_bytes_per_s=4 << 20, arena_bytes=8 << 20) as checkpointer:
        begun_s = time.monotonic()
        checkpointer.save(1)
        checkpointer.fence()
        state["t"] = torch.zeros(9)
        checkpointer.save(2).result(WITHIN_S)
        assert time.monotonic() - begun_s < 4


class Stream:
    """What a CUDA stream is to the marks: it notes what it waits for and in what order streams are entered."""

    def __init__(self, log: list[object]) -> None:
        self.log = log

    def wait_event(self, event: object) -> None:
        self.log.append(("wait", event))


def test_what_comes_in_the_background_comes_behind_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []
    side = Stream(log)

    class Entered:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(("enter", self.stream))

        def __exit__(self, *_: object) -> None:
            log.append(("leave", self.stream))

    class Event:
        def record(self, stream: object) -> None:
            log.append(("record", stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"compute of {device}")
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(streams, "_side_stream", lambda device: side)
    marks = streams.mark([1])
    thread = threading.Thread(target=lambda: behind(marks, log))
    thread.start()
    thread.join(WITHIN_S)
    event = marks[0][1]
    assert log == [("record", "compute of 1"), ("wait", event), ("enter", side), "work", ("leave", side)]


def behind(marks: streams.Marks, log: list[object]) -> None:
    with streams.behind(marks):
        log.append("work")
