"""Conversions: plans, bounds, what a kill, a full disk, damage and rivals for the target leave behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptengine.cli import main as command
from ckptengine.errors import (
    AlreadyExists,
    DigestMismatch,
    LayoutError,
    RootInUse,
    StorageFailed,
    Truncated,
    UnusableRequest,
)
from ckptengine.layout.box import Box
from ckptengine.layout.crc64 import raw_crc64
from ckptengine.layout.digest import format_digest, raw_to_standard
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.operations.convert import Shard, convert
from ckptengine.operations.converting import plan as convert_plan
from ckptengine.operations.converting import run as convert_run
from ckptengine.operations.converting import workspace as convert_workspace
from ckptengine.operations.converting.plan import make_plan
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import read_tensor
from ckptengine.sources.target import LocalTarget
from ckptengine.sources.writer import Document, Job, Layout, Target, Unit
from ckptengine.universal import write as zarr_write
from tests.universal.checkpoints import FolderSource, content, stored, whole


def digest(array: np.ndarray) -> str:
    return format_digest(raw_to_standard(raw_crc64(array), array.nbytes))


def checkpoint(folder: Path, count: int = 6, rows: int = 50) -> tuple[FolderSource, dict[str, np.ndarray]]:
    """Tensors cut in different ways, each with the digest of its true bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, tensors = {}, []
    for i in range(count):
        name, shape = f"model.layers.{i}.weight", (rows + i, 8)
        arrays[name] = content("float32", shape, i)
        half = shape[0] // 2
        boxes = [Box((0, 0), (half, 8)), Box((half, 0), (shape[0] - half, 8))] if i % 2 else [Box.whole(shape)]
        tensors.append(replace(stored(folder, name, "float32", arrays[name], boxes), digest=digest(arrays[name])))
    return FolderSource(folder, tensors, {"lr": 0.1}), arrays


def assert_holds(path: Path, arrays: dict[str, np.ndarray]) -> None:
    source = open_any(path)
    assert sorted(source.names()) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_tensor(source, source.tensor(name)), array)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def left_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _one_tensor_per_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_write, "UNIT_TENSORS", 1)


def test_plan_then_conversion_then_verification(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    before = contents(tmp_path / "in")
    plan = convert(source, tmp_path / "out", to="zarr", dry_run=True)
    assert plan.state == "planned"
    assert plan.covered == plan.tensors == plan.units == plan.files == len(arrays)
    assert plan.read_bytes == plan.write_bytes == sum(array.nbytes for array in arrays.values())
    assert plan.peak_memory_bytes <= 1 << 30
    assert left_beside(tmp_path) == ["in"]
    seen: list[tuple[int, int]] = []
    done = convert(source, tmp_path / "out", to="zarr", verify=True, progress=lambda a, b: seen.append((a, b)))
    assert done == replace(plan, state="committed", compared=len(arrays), verified=len(arrays))
    assert seen[0] == (0, plan.read_bytes)
    assert seen[-1] == (plan.read_bytes, plan.read_bytes)
    assert left_beside(tmp_path) == ["in", "out"]
    assert contents(tmp_path / "in") == before
    assert_holds(tmp_path / "out", arrays)
    assert json.loads(json.dumps(done.to_json()))["state"] == "committed"


def test_each_source_byte_is_read_once_and_each_target_byte_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    size_bytes = sum(array.nbytes for array in arrays.values())
    reads: list[int] = []
    original = source.files.read_into
    source.files.read_into = lambda path, offset, view: (reads.append(view.nbytes), original(path, offset, view))  # type: ignore[method-assign,assignment]
    written: list[int] = []
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (written.append(len(data)), real_write(fd, data))[1])
    convert(source, tmp_path / "out", to="zarr")
    assert sum(reads) == size_bytes
    metadata = sum(path.stat().st_size for path in (tmp_path / "out").rglob("zarr.json"))
    assert sum(written) == size_bytes + metadata


def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "in")
    for name in ("file", "folder"):
        target = tmp_path / name
        target.write_text("precious") if name == "file" else target.mkdir()
        with pytest.raises(AlreadyExists, match=name):
            convert(source, target, to="zarr")
    assert (tmp_path / "file").read_text() == "precious"
    assert left_beside(tmp_path) == ["file", "folder", "in"]


def test_wrong_bytes_in_the_source_are_found_on_the_way(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "in")
    file = source.tensor("model.layers.3.weight").fragments[0].file
    data = bytearray((tmp_path / "in" / file).read_bytes())
    data[100] ^= 4
    (tmp_path / "in" / file).write_bytes(bytes(data))
    with pytest.raises(DigestMismatch, match=r"1 tensors.*model\.layers\.3\.weight"):
        convert(source, tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == ["in"]


def test_sources_with_holes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(40))
    torn = LogicalTensor("w", "int32", (10,), [Fragment(Box((0,), (9,)), "f", 0)])
    with pytest.raises(LayoutError, match="'w'"):
        convert(FolderSource(tmp_path, [torn]), tmp_path / "out", to="zarr", dry_run=True)
    short = LogicalTensor("w", "int32", (11,), [Fragment(Box((0,), (11,)), "f", 0)])
    with pytest.raises(Truncated, match="f"):
        convert(FolderSource(tmp_path, [short]), tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "parquet"}, "formats are"),
        ({"to": "zarr", "memory_bytes": 1000}, "32 MiB"),
        ({"to": "zarr", "workers": 0}, "workers"),
        ({"to": "zarr", "layout": "dp=0"}, "dp must be"),
        ({"to": "zarr", "layout": "xp=2"}, "no axis"),
        ({"to": "zarr", "layout": "zero=4"}, "zero"),
        ({"to": "zarr", "layout": "dp=2,dp=3"}, "twice"),
        ({"to": "zarr", "layout": "order=tp-xx"}, "order"),
        ({"to": "zarr", "shard": "3/3"}, "I/N"),
        ({"to": "zarr", "shard": "x"}, "I/N"),
        ({"to": "zarr", "dask": "tcp://127.0.0.1:1"}, "path"),
    ],
)
def test_requests_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    source, _ = checkpoint(tmp_path / "in")
    with pytest.raises(UnusableRequest, match=words):
        convert(source, tmp_path / "out", **arguments)
    assert left_beside(tmp_path) == ["in"]


def test_layouts_are_parsed_whole() -> None:
    layout = Layout.parse("dp=4, tp=2,pp=3,zero=1,order=tp-pp-dp")
    assert (layout.dp, layout.tp, layout.pp, layout.zero, layout.order) == (4, 2, 3, 1, "tp-pp-dp")
    assert Layout.parse("") == Layout()


@pytest.mark.parametrize("call", ["write", "fdatasync", "rename", "open"])
def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    source, arrays = checkpoint(tmp_path / "in", count=3, rows=40_000)  # large enough to be written directly
    real = getattr(os, call)
    calls: list[object] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if call == "open" and not ("tree" in str(args[0]) and args[1] & os.O_CREAT):
            return real(*args, **kwargs)
        calls.append(args)
        if len(calls) >= (4 if call in ("write", "open") else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr("ckptengine.sources.target.SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StorageFailed, match=r"ENOSPC.*free space"):
            convert(source, tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == ["in"]
    convert(source, tmp_path / "out", to="zarr")
    assert_holds(tmp_path / "out", arrays)


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    inside, go = threading.Event(), threading.Event()
    real = convert_run.write_unit

    def slow(*args: Any) -> None:
        inside.set()
        assert go.wait(30)
        real(*args)

    monkeypatch.setattr(convert_run, "write_unit", slow)
    first = threading.Thread(target=lambda: convert(source, tmp_path / "out", to="zarr"))
    first.start()
    try:
        assert inside.wait(30)
        with pytest.raises(RootInUse, match="out"):
            convert(source, tmp_path / "out", to="zarr")
    finally:
        go.set()
        first.join()
    assert_holds(tmp_path / "out", arrays)


KILL_AFTER = """
import os, signal, sys
from ckptengine.operations.converting import run as convert_run
from ckptengine.operations.convert import convert
from ckptengine.universal import write

def kill_after(units):
    write.UNIT_TENSORS = 1
    real = convert_run.write_unit
    def counted(*args):
        nonlocal units
        if units == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        units -= 1
        real(*args)
    convert_run.write_unit = counted
"""
"""Of a script: from `kill_after(n)` on, a conversion is killed before its unit number n, of one tensor each."""

CHILD = f"""{KILL_AFTER}
from pathlib import Path
from tests.operations_convert.test_convert import checkpoint
folder = Path(sys.argv[1])
source, arrays = checkpoint(folder / "in")
kill_after(int(sys.argv[2]))
convert(source, folder / "out", to="zarr", workers=1)
"""


def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "4"], cwd=root, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_beside(tmp_path) == [".out.convert", "in"]
    source, arrays = checkpoint(tmp_path / "in")
    written: list[str] = []
    real = convert_run.write_unit

    def counted(planned: Any, workspace: Any, unit: Any, progress: Any) -> None:
        written.append(unit.key)
        real(planned, workspace, unit, progress)

    monkeypatch.setattr(convert_run, "write_unit", counted)
    other, _ = checkpoint(tmp_path / "in2", count=2)
    with pytest.raises(AlreadyExists, match="unfinished conversion"):
        convert(other, tmp_path / "out", to="zarr")
    plan = convert(source, tmp_path / "out", to="zarr", workers=1, verify=True)
    assert len(written) == len(arrays) - 4
    assert plan.compared == plan.verified == len(arrays)
    assert left_beside(tmp_path) == ["in", "in2", "out"]
    assert_holds(tmp_path / "out", arrays)


def test_records_from_before_a_restart_of_the_machine_do_not_count(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "4"], cwd=root, capture_output=True, check=False)
    for path in (tmp_path / ".out.convert/units").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))
    for path in (tmp_path / ".out.convert/tree").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # what a power cut leaves of files that were never synced
    source, arrays = checkpoint(tmp_path / "in")
    convert(source, tmp_path / "out", to="zarr")
    assert_holds(tmp_path / "out", arrays)


def test_shards_in_any_order_make_the_same_target(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    convert(source, tmp_path / "whole", to="zarr")
    for index in (2, 0):
        assert convert(source, tmp_path / "out", to="zarr", shard=f"{index}/3").state == "waiting"
        assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", to="zarr", shard=Shard(1, 3)).state == "committed"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert left_beside(tmp_path) == ["in", "out", "whole"]
    assert_holds(tmp_path / "out", arrays)


def test_a_shard_with_nothing_to_do_is_no_failure(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    units = convert(source, tmp_path / "out", to="zarr", dry_run=True).units
    states = [convert(source, tmp_path / "out", to="zarr", shard=Shard(i, units + 2)).state for i in range(units + 2)]
    assert states == ["waiting"] * (units - 1) + ["committed"] + ["waiting"] * 2
    assert_holds(tmp_path / "out", arrays)


def test_shards_on_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, arrays = checkpoint(tmp_path / "in", count=9)
    synced: list[str] = []
    real = LocalTarget.sync
    monkeypatch.setattr(LocalTarget, "sync", lambda self: (synced.append(convert_workspace._boot()), real(self))[1])
    states = []
    for index in range(3):
        monkeypatch.setattr(convert_workspace, "_boot", lambda machine=f"machine {index}": machine)
        states.append(convert(source, tmp_path / "out", to="zarr", shard=Shard(index, 3)).state)
    assert states == ["waiting", "waiting", "committed"]
    assert synced == ["machine 0", "machine 1", "machine 2", "machine 2"], "each makes durable what it has written"
    assert_holds(tmp_path / "out", arrays)


def test_what_another_machine_has_not_made_durable_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arrays = checkpoint(tmp_path / "in", count=9)
    monkeypatch.setattr(convert_workspace, "_boot", lambda: "one")
    with monkeypatch.context() as cut:  # it goes down before its files are synced
        cut.setattr(convert_workspace.LocalWorkspace, "settle", lambda self, keys: None)
        assert convert(source, tmp_path / "out", to="zarr", shard="0/2").state == "waiting"
    monkeypatch.setattr(convert_workspace, "_boot", lambda: "two")
    assert convert(source, tmp_path / "out", to="zarr", shard="1/2").state == "waiting"
    assert convert(source, tmp_path / "out", to="zarr", shard="0/2").state == "committed"
    assert_holds(tmp_path / "out", arrays)


def test_shards_at_the_same_time(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "in", count=9)
    states: list[str] = []

    def part(index: int) -> None:
        states.append(convert(source, tmp_path / "out", to="zarr", shard=Shard(index, 3)).state)

    threads = [threading.Thread(target=part, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states) == ["committed", "waiting", "waiting"]
    assert_holds(tmp_path / "out", arrays)


def test_every_unit_is_in_exactly_one_shard(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "in", count=10)
    units = make_plan(source, "x", to="zarr").units
    parts = [Shard(i, 4).of(units) for i in range(4)]
    assert sorted(unit.key for part in parts for unit in part) == sorted(unit.key for unit in units)


def test_large_tensors_are_cut_into_units_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_write, "UNIT_BYTES", 1000)
    (tmp_path / "in").mkdir()
    array = content("float32", (300, 10))
    source = FolderSource(
        tmp_path / "in", [replace(whole(tmp_path / "in", "w", "float32", array), digest=digest(array))]
    )
    options = {"chunk_bytes": 400, "shard_bytes": 2000}
    plan = convert(source, tmp_path / "out", to="zarr", options=options, verify=True)
    assert plan.units == plan.files > 4
    assert plan.compared == plan.verified == 1
    assert_holds(tmp_path / "out", {"w": array})


def test_memory_of_a_unit_is_waited_for(tmp_path: Path) -> None:
    budget = convert_run._Budget(100)
    order: list[str] = []
    first = budget.take(70)

    def second() -> None:
        with budget.take(60):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    order.append("first")
    first.__exit__(None, None, None)
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    "sizes", [[10], [5, 1 << 20], [3 << 20, 7], [4096] * 2000, [(4 << 20) + 4096, 1, (4 << 20) - 1]]
)
def test_local_sinks_hold_every_byte(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sink")  # on a real disk, where direct I/O works
    target = LocalTarget(folder)
    data = np.random.default_rng(len(sizes)).bytes(sum(sizes))
    at = 0
    with target.create("a/b.bin") as sink:
        for size in sizes:
            assert sink.position == at
            sink.write(memoryview(data)[at : at + size])
            at += size
        assert sink.position == at
    target.sync()
    assert (folder / "a/b.bin").read_bytes() == data


@pytest.mark.parametrize("nbytes", [0, 10, 1 << 20, (4 << 20) + 5])
def test_files_that_are_put(nbytes: int, tmp_path: Path) -> None:
    target = LocalTarget(tmp_path)
    data = np.random.default_rng(nbytes).bytes(nbytes)
    for path in ("x", "a/x", "a/y", "b/c/d/x", "b/c/d/e/x"):
        target.put(path, b"longer than what replaces it" * (nbytes // 20 + 1))
        target.put(path, memoryview(data))
        assert (tmp_path / path).read_bytes() == data
    target.sync()


def test_a_sync_that_fails_beside_the_work_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = LocalTarget(tmp_path)

    def failing(fd: int) -> bool:
        monkeypatch.undo()  # only the first one fails
        raise StorageFailed("cannot sync")

    monkeypatch.setattr("ckptengine.sources.target.AHEAD_BYTES", 100)
    monkeypatch.setattr("ckptengine.sources.target._syncfs", failing)
    target.put("x", bytes(99))
    target.put("y", bytes(99))
    with pytest.raises(StorageFailed, match="cannot sync"):
        target.sync()


def test_remote_targets(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    source, arrays = checkpoint(tmp_path / "in")
    plan = convert(source, "memory://bucket/out", to="zarr", verify=True)
    assert plan.state == "committed"
    assert plan.verified == len(arrays)
    assert not memory.exists("/bucket/out.convert")
    with pytest.raises(AlreadyExists, match="bucket/out"):
        convert(source, "memory://bucket/out", to="zarr")
    opened = open_any("memory://bucket/out")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_tensor(opened, opened.tensor(name)), array)
    memory.rm("/bucket", recursive=True)


def test_remote_targets_that_fail_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    source, _ = checkpoint(tmp_path / "in")
    real: Callable[..., Any] = memory.open

    def failing(path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "weight/c" in path and "w" in mode and "layers/4" in path:
            raise OSError("secret=abc")
        return real(path, mode, **kwargs)

    monkeypatch.setattr(memory, "open", failing)
    with pytest.raises(StorageFailed) as caught:
        convert(source, "memory://fails/out", to="zarr")
    assert "secret" not in str(caught.value)
    assert not memory.exists("/fails/out")
    assert not memory.exists("/fails/out.convert")


def test_dask_workers_do_the_units(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    source, arrays = checkpoint(tmp_path / "in")
    convert(source, tmp_path / "first", to="zarr")
    script = """
import sys, warnings
warnings.simplefilter("ignore")
from distributed import LocalCluster
from ckptengine.operations.convert import convert
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        plan = convert(sys.argv[1], sys.argv[2], to="zarr", dask=cluster.scheduler_address, verify=True)
        print(plan.state, plan.compared, plan.verified)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "first"), str(tmp_path / "out")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["committed", str(len(arrays)), str(len(arrays))], done.stderr
    assert_holds(tmp_path / "out", arrays)


class _TwiceWriter:
    """Stores every tensor twice, as a format with weights and master copies does."""

    format = "twice"
    options: tuple[str, ...] = ()
    ranked = False

    def __init__(self) -> None:
        self._real = zarr_write.ZarrWriter()

    def units(self, job: Job) -> Any:
        return self._real.units(job)

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        for name in unit.tensors:
            box = Box.whole(job.tensor(name).shape)
            job.read(name, box, bytearray(box.size * 4))
        return self._real.write(job, unit, target)

    def finish(self, job: Job, results: Any, target: Target) -> None:
        self._real.finish(job, results, target)


def test_tensors_that_are_read_twice_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_plan, "writer_of", lambda name: _TwiceWriter())
    source, arrays = checkpoint(tmp_path / "in")
    assert convert(source, tmp_path / "out", to="zarr").compared == len(arrays)
    file = source.tensor("model.layers.3.weight").fragments[0].file
    data = bytearray((tmp_path / "in" / file).read_bytes())
    data[100] ^= 4
    (tmp_path / "in" / file).write_bytes(bytes(data))
    with pytest.raises(DigestMismatch, match=r"model\.layers\.3\.weight"):
        convert(source, tmp_path / "out2", to="zarr")


def test_verification_finds_what_the_target_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(zarr_write.ZarrWriter):
        def finish(self, job: Job, results: Any, target: Target) -> None:
            super().finish(job, results, target)
            path = Path(str(target.local_path("model/layers/2/weight/c.0.0")))
            data = path.read_bytes()
            path.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:])

    source, _ = checkpoint(tmp_path / "in")
    convert(source, tmp_path / "stored", to="safetensors")
    monkeypatch.setattr(convert_plan, "writer_of", lambda name: Wrong())
    with pytest.raises(DigestMismatch, match=r"1 tensors read back differ.*model\.layers\.2\.weight"):
        convert(source, tmp_path / "out", to="zarr", verify=True)
    asked = ["convert", str(tmp_path / "stored"), str(tmp_path / "again"), "--to", "zarr", "--verify"]
    assert command(asked) == 1
    told = capsys.readouterr()
    assert "model.layers.2.weight" in told.err
    assert not told.out
    assert command(asked) == 2, "it is there now"


def test_a_source_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "4"], cwd=root, capture_output=True, check=False)
    source, _ = checkpoint(tmp_path / "in")
    first = tmp_path / "in" / source.tensor("model.layers.0.weight").fragments[0].file
    os.utime(first, ns=(1, 1))
    with pytest.raises(AlreadyExists, match="unfinished conversion of something else"):
        convert(source, tmp_path / "out", to="zarr")


def test_a_safetensors_target_named_like_a_file_is_one_file(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "src")
    plan = convert(source, tmp_path / "out.safetensors", to="safetensors", verify=True)
    assert (tmp_path / "out.safetensors").is_file()
    assert (plan.state, plan.files, plan.verified) == ("committed", 1, len(arrays))
    assert_holds(tmp_path / "out.safetensors", arrays)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "src"]


def test_a_single_safetensors_file_leaves_nothing_out_unasked(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "src")
    moment = replace(source.tensor("model.layers.0.weight"), name="optim.layers.0.weight.exp_avg")
    more = FolderSource(tmp_path / "src", [*map(source.tensor, source.names()), moment])
    target = tmp_path / "out.safetensors"
    with pytest.raises(UnusableRequest, match=r"optim\.layers\.0.*\(1 in all\).*weights_only=true"):
        convert(more, target, to="safetensors")
    with pytest.raises(UnusableRequest, match="shard_bytes"):
        convert(source, target, to="safetensors", options={"shard_bytes": 1000})
    with pytest.raises(UnusableRequest, match="remote targets are folders"):
        convert(source, "memory://x/out.safetensors", to="safetensors", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    convert(more, target, to="safetensors", options={"weights_only": True})
    assert_holds(target, arrays)


@pytest.mark.parametrize("to", convert_plan.FORMATS)
def test_an_option_that_the_format_has_not_is_refused(tmp_path: Path, to: str) -> None:
    source, _ = checkpoint(tmp_path / "in", count=1)
    with pytest.raises(UnusableRequest, match=rf"no such option for {to}: weight_only; there are "):
        convert(source, tmp_path / "out", to=to, options={"weight_only": True})
    assert not (tmp_path / "out").exists()
