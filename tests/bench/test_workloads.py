"""Tiny runs of every workload: that it runs, reports, and finds wrong bytes; never how fast."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import worker
from bench.driver import engines_for, plan, rotated, run_one
from bench.engine import Engine, Wait, finished
from bench.figures import stall_processes
from bench.names import ENGINES
from bench.options import WORKLOADS, Job, Options, job
from bench.rivals.torch_save import TorchSave
from bench.state import LiveState
from bench.workloads import disk, durable, many_small, metadata, restore, stall
from bench.workloads.stall_figures import end_to_end, stolen
from ckptengine.errors import UnusableRequest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
"""torch DCP says so whenever it is used in one process."""


def tiny(tmp_path: Path, workload: str, engine: str) -> Job:
    """A job of the smallest size."""
    return job(Options(size="tiny"), workload, engine, str(tmp_path), threads=1)


@pytest.mark.parametrize("engine", ["none", "torch-save", "dcp-async", "safetensors"])
def test_stall_reports_every_save_and_finds_its_bytes_equal(tmp_path: Path, engine: str) -> None:
    figures = stall.measure(tiny(tmp_path, "stall", engine))
    (block,) = figures["blocks"]
    assert block["repeatable"]
    assert set(block["checks"]) == ({"not a checkpoint"} if engine == "none" else {"ok"})
    assert len(block["trace"]["saves"]) == len(block["checks"]) >= 2
    assert all(save["durable_s"] >= save["start_s"] for save in block["trace"]["saves"])
    samples = stolen(figures["plain_step_s"], block)
    assert samples
    assert end_to_end(figures["plain_step_s"], block) > 0
    assert list(tmp_path.iterdir()) == [], "a checked checkpoint must be deleted"


def test_an_interval_that_is_repeated_gives_more_samples_of_the_same_steps(tmp_path: Path) -> None:
    figures = stall.measure(dataclasses.replace(tiny(tmp_path, "stall", "torch-save"), every=(2, 2, 2)))
    assert [block["every"] for block in figures["blocks"]] == [2, 2, 2]
    assert {check for block in figures["blocks"] for check in block["checks"]} == {"ok"}
    (one,) = stall_processes({"x": [{**figures, "blocks": figures["blocks"][:1]}]}, 2)["x"]["blocked_s"]
    (all_of_them,) = stall_processes({"x": [figures]}, 2)["x"]["blocked_s"]
    assert len(all_of_them) > len(one) > 0


class ForgetsOneTensor(TorchSave):
    """Restores everything but the last tensor."""

    def restore(self, step: int) -> None:
        super().restore(step)
        list(self.state.tensors().values())[-1].fill_(5)


class SavesTooLate(TorchSave):
    """Writes the state as it is after the next update."""

    durable_by_itself = True
    _late = 0

    def save(self, step: int) -> Wait:
        self._late = step
        return finished

    def after_update(self) -> None:
        if self._late:
            super().save(self._late)
        self._late = 0

    def drain(self) -> None:
        self.after_update()


@pytest.mark.parametrize("wrong", [ForgetsOneTensor, SavesTooLate])
def test_wrong_bytes_are_marked(tmp_path: Path, wrong: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "engine_class", lambda name: wrong)
    todo = dataclasses.replace(tiny(tmp_path, "stall", "torch-save"), every=(4,), steps=4)
    checks = stall.measure(todo)["blocks"][0]["checks"]
    assert checks[0].startswith("WRONG BYTES")


@pytest.mark.parametrize("engine", ["pwrite", "torch-save-fsync", "dcp-save"])
def test_durable(tmp_path: Path, engine: str) -> None:
    figures = durable.measure(tiny(tmp_path, "durable", engine))
    (save,) = figures["saves"]
    assert save["durable_s"] >= save["call_s"] > 0
    assert save["limit_s"] > 0
    assert save["bytes_on_disk"] >= figures["state_bytes"]
    assert save["check"] == ("not a checkpoint" if engine == "pwrite" else "ok")


def test_memory_sees_a_copy_of_the_state(tmp_path: Path) -> None:
    """In a process of its own: one that ran other tests has freed memory left in which the copy would not show."""
    todo = dataclasses.replace(tiny(tmp_path, "memory", "dcp-async"), state_bytes=24 << 20, saves=1)
    result = run_one(todo, tmp_path / "job").result
    assert result["status"] == "ok", result
    figures = result["figures"]
    assert figures["extra_bytes"] > figures["state_bytes"] // 2
    assert len(figures["samples"]) > 3


def test_restore(tmp_path: Path) -> None:
    figures = restore.measure(tiny(tmp_path, "restore", "torch-save"))
    for one in figures["restores"]:
        assert one["cold"]["check"] == one["warm"]["check"] == "ok"
        assert one["cold"]["seconds"] > 0
        assert one["limit_s"] > 0


def test_many_small(tmp_path: Path) -> None:
    figures = many_small.measure(tiny(tmp_path, "many-small", "torch-save"))
    assert figures["tensors"] == 200
    assert figures["saves"][0]["check"] == "ok"
    assert figures["restore_s"] > 0


class FinishesWhenDrained(TorchSave):
    """Its save is finished only when the training thread says so."""

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._finished = threading.Event()

    def save(self, step: int) -> Wait:
        super().save(step)

        def wait() -> None:
            assert self._finished.wait(10), "waited for before it was drained"

        return wait

    def drain(self) -> None:
        self._finished.set()


@pytest.mark.parametrize("workload", [restore, many_small, durable])
def test_engines_that_finish_on_the_training_thread_are_drained_before_they_are_waited_for(
    tmp_path: Path, workload: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "engine_class", lambda name: FinishesWhenDrained)
    assert workload.measure(tiny(tmp_path, "restore", "torch-save"))["state_bytes"] > 0


def test_disk(tmp_path: Path) -> None:
    figures = disk.measure(tiny(tmp_path, "disk", ""))
    names = [name for name, _, _ in figures["rounds"][0]]
    assert len(names) >= 10
    assert all(rate > 0 for _, rate, _ in figures["rounds"][0])
    assert list(tmp_path.iterdir()) == []


def test_metadata_grows_with_the_layout_not_with_the_fragments(tmp_path: Path) -> None:
    small = metadata.measure(dataclasses.replace(tiny(tmp_path, "metadata", "ckptengine"), simulated=(4, 20)))
    large = metadata.measure(dataclasses.replace(tiny(tmp_path, "metadata", "ckptengine"), simulated=(64, 20)))
    rival = metadata.measure(dataclasses.replace(tiny(tmp_path, "metadata", "dcp-save"), simulated=(64, 20)))
    assert large["central_bytes"] < 4 * small["central_bytes"]
    assert large["central_bytes"] < rival["central_bytes"]
    assert large["fragments_of_one_rank"] == rival["fragments_of_one_rank"] > 0


def test_a_job_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    sample = run_one(tiny(tmp_path, "disk", ""), tmp_path / "job")
    assert sample.result["status"] == "ok"
    assert not (tmp_path / "job").exists()
    assert str(tmp_path) not in json.dumps(sample.to_json())


def test_what_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = dataclasses.replace(tiny(tmp_path, "disk", ""), workload="no-such-workload")
    result = run_one(broken, tmp_path / "job").result
    assert result["status"] == "failed"
    assert "no_such_workload" in result["reason"]


def test_a_missing_device_is_skipped_with_the_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = worker.run(dataclasses.replace(tiny(tmp_path, "stall", "none"), device="cuda"))
    assert result == {"status": "skipped", "reason": "no cuda device"}


def test_repetitions_are_interleaved_and_start_elsewhere() -> None:
    options = Options(size="tiny", repetitions=3, workloads=("stall",))
    jobs = list(plan(options, "there"))
    count = len(engines_for(options, "stall"))
    rounds = [[one.engine for one in jobs[i * count : (i + 1) * count]] for i in range(3)]
    assert [{*names} for names in rounds] == [{*ENGINES}] * 3
    assert len({names[0] for names in rounds}) == 3
    mixed = [one.workload for one in plan(Options(size="tiny", repetitions=2, workloads=("disk", "stall")), "there")]
    assert mixed == [*["disk"], *["stall"] * count] * 2, "a repetition of everything before the next of anything"
    assert rotated(["a", "b", "c", "d"], 0) == ["a", "b", "c", "d"]


def test_every_workload_is_planned_and_jobs_survive_json() -> None:
    jobs = list(plan(Options(size="tiny", workloads=WORKLOADS), "there"))
    assert {one.workload for one in jobs} == {*WORKLOADS}
    for one in jobs:
        assert Job.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "wrong", [{"workloads": ("flight",)}, {"steps": 0}, {"state_bytes": 5}, {"every": ()}, {"ranks": (0, 1)}]
)
def test_unusable_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UnusableRequest):
        Options(**wrong)  # type: ignore[arg-type]


def test_a_traceback_in_a_result_does_not_tell_where_the_machine_keeps_things() -> None:
    text = f'File "{Path(worker.__file__).resolve()}", line 1'
    assert worker.without_places(text) == f'File "bench{os.sep}worker.py", line 1'
