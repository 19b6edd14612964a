"""Write jobs from Python: what arrives, what the fence allows, what failures say."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ckptengine import native
from ckptengine.errors import SaveFailed, StorageFailed, UnusableRequest
from ckptengine.layout.digest import shift
from tests.native.conftest import NEEDS_LIBRARY, Target, counting, tiled

from ..descriptors import open_descriptors

pytestmark = NEEDS_LIBRARY


def test_bytes_and_digests(engine: native.Engine, target: Target) -> None:
    tensors = [counting(size, seed=size) for size in (5, 0, 70_001, 16_384, 300_000, 1)]
    extents, end, slots = tiled(tensors, begin=4096, gap_bytes=13)
    extents["follow_bytes"] = 9
    job = engine.submit(target.files, extents, body=(4096, end), granule_slots=slots, reserve_bytes=end, keep=tensors)
    assert job.wait_written(60)
    job.sync()
    content = np.fromfile(target.path, np.uint8)
    expected = np.zeros(end, np.uint8)
    for extent, tensor in zip(extents, tensors, strict=True):
        expected[int(extent["file_offset"]) :][: tensor.size] = tensor
    assert np.array_equal(content, expected)
    raws = [native.raw_crc64(tensor) for tensor in tensors]
    assert job.extent_digests().tolist() == raws
    assert job.tensor_contributions().tolist() == [shift(raw, 9) for raw in raws]
    assert job.granules().tolist() == [int(raw) for tensor in tensors for raw in native.raw_granules(tensor)]
    progress = job.progress
    assert progress.captured_bytes == sum(tensor.size for tensor in tensors)
    assert progress.written_bytes == progress.body_bytes == end - 4096
    assert progress.submitted_ns <= progress.captured_ns <= progress.written_ns <= time.monotonic_ns()
    assert progress.peak_buffer_bytes <= 3 << 16
    events = job.trace()
    assert events[events["kind"] == native.TRACE_KINDS.index("write")]["size_bytes"].sum() == end - 4096
    assert job.state == "written"
    assert job.error is None


def test_strided_memory(engine: native.Engine, target: Target) -> None:
    matrix = counting(300 * 400 * 4).view(np.uint32).reshape(300, 400)
    views = [matrix.T, matrix[::3, 5::2], np.broadcast_to(matrix[0], (50, 400)), matrix[:, ::-1]]
    extents = np.zeros(len(views), native.EXTENT)
    loops, at, slot = [], 0, 0
    for extent, view in zip(extents, views, strict=True):
        rows = list(zip(view.shape, view.strides, strict=True))
        extent["address"], extent["size_bytes"], extent["file_offset"] = view.ctypes.data, view.nbytes, at
        extent["granule_slot"], extent["device"], extent["item_bytes"] = slot, -1, 4
        extent["source_dims_begin"], extent["source_dims"] = len(loops), len(rows)
        loops += rows
        at += view.nbytes
        slot += -(-view.nbytes // 16384)
    job = engine.submit(target.files, extents, body=(0, at), loops=np.array(loops, np.int64), granule_slots=slot)
    assert job.wait_written(60)
    assert target.path.read_bytes()[:at] == b"".join(view.tobytes() for view in views)
    assert job.recheck(range(len(views)), samples=0).size == 0


def test_captured_memory_may_change(engine: native.Engine, target: Target, faults: None) -> None:
    tensors = [counting(90_000, seed=i) for i in range(20)]
    kept = [tensor.copy() for tensor in tensors]
    extents, end, slots = tiled(tensors)
    native.arm_fault("write", sticky=True, delay_s=0.003)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    for number in (17, 3):
        job.hurry([number])
        assert job.wait_captured([number], 60)
        assert job.captured(number)
        tensors[number][:] = 0
    assert job.wait_captured(timeout_s=60)
    for tensor in tensors:
        tensor[:] = 0
    assert job.wait_written(60)
    for extent, tensor in zip(extents, kept, strict=True):
        content = np.fromfile(target.path, np.uint8, tensor.size, offset=int(extent["file_offset"]))
        assert np.array_equal(content, tensor)
    assert job.recheck(range(20), samples=1).tolist() == list(range(20))


def test_waits_run_out(engine: native.Engine, target: Target, faults: None) -> None:
    tensors = [counting(400_000)]
    extents, end, slots = tiled(tensors)
    native.arm_fault("write", sticky=True, delay_s=0.05)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    started_s = time.monotonic()
    assert not job.wait_written(0.01)
    assert not job.wait_captured([0], 0.01)
    assert time.monotonic() - started_s < 5
    assert job.state == "running"
    native.disarm_faults()
    assert job.wait_written(60)


def test_a_full_disk(engine: native.Engine, target: Target, faults: None) -> None:
    tensors = [counting(400_000)]
    extents, end, slots = tiled(tensors)
    native.arm_fault("write", nth=2, error=errno.ENOSPC, sticky=True)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    with pytest.raises(StorageFailed, match=r"rank\.bin at byte \d+: No space left on device") as caught:
        job.wait_written(60)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert job.wait_captured(timeout_s=60)  # the fence lets go: nothing reads the memory any more
    assert job.state == "failed"
    with pytest.raises(StorageFailed):
        job.sync()
    native.disarm_faults()
    again = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    assert again.wait_written(60)


def test_a_failed_flush_stays_failed(engine: native.Engine, target: Target, faults: None) -> None:
    tensors = [counting(1000)]
    extents, end, slots = tiled(tensors)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    assert job.wait_written(60)
    native.arm_fault("sync", error=errno.EIO)
    for _ in range(2):
        with pytest.raises(StorageFailed, match="fdatasync"):
            job.sync()


def test_cancel(engine: native.Engine, target: Target, faults: None) -> None:
    tensors = [counting(800_000)]
    extents, end, slots = tiled(tensors)
    native.arm_fault("write", sticky=True, delay_s=0.01)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots, keep=tuple(tensors))
    job.cancel()
    with pytest.raises(SaveFailed, match="cancelled"):
        job.wait_written(60)
    assert job.wait_captured(timeout_s=60)
    assert job.progress.written_bytes < end


def test_closing_wakes_waiters(target: Target, faults: None) -> None:
    engine = native.Engine(workers=1, buffers=2, buffer_bytes=1 << 16)
    tensors = [counting(2_000_000)]
    extents, end, slots = tiled(tensors)
    native.arm_fault("write", sticky=True, delay_s=0.02)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    released = []
    waiter = threading.Thread(target=lambda: released.append(job.wait_captured(timeout_s=60)))
    waiter.start()
    engine.close()
    waiter.join(30)
    assert released == [True]
    assert job.state == "cancelled"
    engine.close()
    with pytest.raises(UnusableRequest, match="closed"):
        engine.submit(target.files, extents, body=(0, end), granule_slots=slots)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("file_offset", 1 << 63, "outside the body"),
        ("size_bytes", (1 << 64) - 1, "outside the body"),
        ("granule_slot", 10**9, "granules lie outside"),
        ("address", 0, "no address"),
        ("source_dims", 3, "outside the table"),
        ("run_bytes", 10, "fewer bytes"),
    ],
)
def test_nonsense_is_refused(engine: native.Engine, target: Target, field: str, value: int, message: str) -> None:
    tensors = [counting(1000)]
    extents, end, slots = tiled(tensors)
    extents[field] = value
    with pytest.raises(ValueError, match=message):
        engine.submit(target.files, extents, body=(0, end), granule_slots=slots)


def test_unusable_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="4096"):
        native.Engine(buffers=2, buffer_bytes=1000)
    with pytest.raises(ValueError, match="workers"):
        native.Engine(workers=0)
    with pytest.raises(UnusableRequest, match="cannot set up"):
        native.Engine(buffers=1 << 30, buffer_bytes=1 << 20)


def test_a_hundred_thousand_extents_register_quickly(engine: native.Engine, target: Target) -> None:
    count = 100_000
    memory = counting(count * 64)
    extents = np.zeros(count, native.EXTENT)
    extents["address"] = memory.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(64)
    extents["size_bytes"], extents["device"], extents["run_bytes"] = 60, -1, 60
    extents["file_offset"] = np.arange(count) * 60
    extents["granule_slot"] = np.arange(count)
    times_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        job = engine.submit(target.files, extents, body=(0, count * 60), granule_slots=count)
        times_s.append(time.perf_counter() - started_s)
        assert job.wait_written(60)
    assert min(times_s) < 0.25  # a few milliseconds on an idle machine
    expected = memory.reshape(count, 64)[:, :60]
    assert target.path.read_bytes()[: count * 60] == expected.tobytes()
    assert job.granules()[12_345] == native.raw_crc64(np.ascontiguousarray(expected[12_345]))


def test_many_jobs_leave_nothing_behind(engine: native.Engine, target: Target) -> None:
    tensors = [counting(100_000)]
    extents, end, slots = tiled(tensors)

    def save(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
            assert job.wait_written(60)
        del job
        gc.collect()
        descriptors = open_descriptors()
        return descriptors, len(os.listdir("/proc/self/task")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = save(100)
    after = save(400)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 4096  # KiB


def test_the_mutation_guard_sees_one_flipped_bit(engine: native.Engine, target: Target) -> None:
    tensors = [counting(200_000, seed=i) for i in range(4)]
    extents, end, slots = tiled(tensors)
    job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    assert job.wait_written(60)
    assert job.recheck(range(4), samples=0).size == 0
    tensors[2][123_456] ^= 4
    assert job.recheck(range(4), samples=0).tolist() == [2]
    hits = sum(job.recheck([2], samples=4, seed=seed).size for seed in range(40))
    assert 0 < hits < 40  # samples wander with the seed


SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
from ckptengine import native
from tests.native.conftest import Target, counting, tiled
from pathlib import Path

target = Target(Path(sys.argv[1]))
engine = native.Engine(workers=2, buffers=2, buffer_bytes=1 << 16)
tensors = [counting(3_000_000)]
extents, end, slots = tiled(tensors)
native.arm_fault("write", sticky=True, delay_s=0.01)
job = engine.submit(target.files, extents, body=(0, end), granule_slots=slots, keep=tuple(tensors))
"""


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + script, str(folder)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "script", "status"),
    [
        ("exit with a job under way", "print('end')", 0),
        ("exception with a job under way", "raise SystemExit(3)", 3),
        ("the tensors are gone first", "tensors[0] = None; del tensors; print('end')", 0),
        ("a thread waits at exit", "threading.Thread(target=job.wait_captured).start(); print('end')", 0),
        (
            "a fork",
            """
pid = os.fork()
if pid == 0:
    try:
        engine.submit(target.files, extents, body=(0, end), granule_slots=slots)
    except native.engine.UnusableRequest:
        engine.close()
        del job, engine
        sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
native.disarm_faults()
assert job.wait_written(30)
""",
            0,
        ),
        (
            "an interrupt while the fence waits",
            """
native.arm_fault("write", sticky=True, delay_s=1.5)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    job.wait_captured(help=False)
except KeyboardInterrupt:
    sys.exit(7)
""",
            7,
        ),
        ("killed at a write", "native.arm_fault('write', kill=True); job.wait_written(30)", -9),
    ],
    ids=lambda value: (
        value if isinstance(value, str) and " " in value and "\n" not in value and "(" not in value else ""
    ),
)
def test_ends_of_processes(tmp_path: Path, name: str, script: str, status: int) -> None:
    result = run(tmp_path, script)
    assert result.returncode == status, (name, result.stderr)
    assert "Traceback" not in result.stderr


def test_the_switch_turns_the_library_off() -> None:
    code = "from ckptengine import native; assert not native.available(); assert native.backend() == 'portable'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CKPTENGINE_NATIVE": "0"},
                   cwd=Path(__file__).parents[2], timeout=60)  # fmt: skip
