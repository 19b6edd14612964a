"""Runs that are cut off and go on, time limits, and the processes that jobs run in."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench import driver
from bench.arguments import main
from bench.driver import Sample, line_about, plan, remaining_s, run_all, run_one, worker_environment
from bench.journal import Journal, key
from bench.nursery import Nursery
from bench.options import DEFAULT_WORKLOADS, PRESETS, Options, job
from ckptengine.errors import UnreadableFormat, UnusableRequest

OPTIONS = Options(size="tiny", workloads=("durable",), engines=("ckptengine", "torch-save"), repetitions=2)
RUN = {"schema": 1, "options": {"size": "tiny"}}


def sample(number: int, status: str = "ok", wall_s: float = 1.0) -> Sample:
    todo = list(plan(OPTIONS, "there"))[number]
    return Sample(todo, {"status": status, "reason": "because", "figures": {"n": number}}, wall_s, 0.5)


def test_a_journal_gives_back_what_was_done(tmp_path: Path) -> None:
    first = Journal(tmp_path / "r.json", RUN)
    first.add(sample(0))
    first.add(sample(2))
    first.close()
    again = Journal(tmp_path / "r.json", {**RUN, "date": "later"})
    again.close()
    assert again.run == RUN, "the run that was begun goes on"
    assert {one.result["figures"]["n"] for one in again.done.values()} == {0, 2}
    assert set(again.done) == {key(dataclasses.replace(sample(n).job, directory="elsewhere")) for n in (0, 2)}


def test_a_journal_that_ends_in_the_middle_of_a_line_loses_that_line_only(tmp_path: Path) -> None:
    first = Journal(tmp_path / "r.json", RUN)
    first.add(sample(0))
    first.close()
    with open(first.path, "a") as stream:
        stream.write('{"job": {"wor')
    second = Journal(tmp_path / "r.json", RUN)
    assert len(second.done) == 1
    second.add(sample(1))
    second.close()
    third = Journal(tmp_path / "r.json", RUN)
    third.close()
    assert len(third.done) == 2


def test_a_journal_of_other_options_or_none_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "r.json", RUN).close()
    with pytest.raises(UnusableRequest, match="other options"):
        Journal(tmp_path / "r.json", {"schema": 1, "options": {"size": "real"}})
    (tmp_path / "x.json.journal").write_text("[1]\nnonsense\n")
    with pytest.raises(UnreadableFormat, match="not the journal"):
        Journal(tmp_path / "x.json", RUN)


def test_a_run_that_is_cut_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def one(todo: Any, folder: Path, nursery: Any) -> Sample:
        if len(ran) == 3 and stop:
            raise KeyboardInterrupt
        ran.append(key(todo))
        return Sample(todo, {"status": "skipped", "reason": "not here"} if todo.engine == "" else
                      {"status": "failed", "reason": "a test"}, 0.25)  # fmt: skip

    monkeypatch.setattr(driver, "run_one", one)
    argv = ["--tiny", "--workload", "durable", "--rivals", "torch-save", "--repetitions", "2"]
    argv += ["--json", str(tmp_path / "r.json"), "--directory", str(tmp_path)]
    stop = True
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert (tmp_path / "r.json.journal").exists()
    assert not (tmp_path / "r.json").exists()
    stop = False
    assert main(argv) == 1, "ours failed"
    assert len(ran) == len(set(ran)) == 6
    document = json.loads((tmp_path / "r.json").read_text())
    assert len(document["samples"]) == 6
    assert document["seconds"] >= 0.7, "the seconds of both starts"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_run_that_is_terminated_leaves_its_journal_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(todo: Any, folder: Path, nursery: Any) -> Sample:
        folder.mkdir()
        (folder / "checkpoint").write_text("gigabytes")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("it went on")

    monkeypatch.setattr(driver, "run_one", one)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["--tiny", "--workload", "durable", "--json", str(tmp_path / "r.json"), "--directory", str(tmp_path)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["r.json.journal"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_job_starts_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "run_one", lambda todo, *_: sample(0))
    done = {key(sample(0).job): sample(0, wall_s=100.0)}
    lines: list[str] = []
    options = dataclasses.replace(OPTIONS, time_limit_s=99.0)
    found = run_all(options, lines.append, done, key=key)
    assert [one.result["status"] for one in found] == ["ok"] + ["skipped"] * 3
    assert "time limit of 1.65 minutes" in found[-1].result["reason"]
    assert lines == []


def test_the_default_run_at_small_has_a_limit_and_other_runs_have_none() -> None:
    assert Options().limit_s == PRESETS["small"].time_limit_s
    assert PRESETS["small"].time_limit_s is not None
    assert PRESETS["small"].time_limit_s <= 20 * 60
    assert Options(workloads=("stall",)).limit_s is None
    assert Options(time_limit_s=5.0).limit_s == 5.0
    assert {"stall", "durable", "memory", "restore", "reshard", "many-small", "metadata"} <= {*DEFAULT_WORKLOADS}
    with pytest.raises(UnusableRequest):
        Options(time_limit_s=0.0)


def test_what_is_left_is_told_from_jobs_of_the_same_workload() -> None:
    disk = job(OPTIONS, "disk", "", "there")
    samples = [sample(0, wall_s=4.0), sample(1, wall_s=6.0), sample(2, "failed", wall_s=999.0),
               Sample(disk, {"status": "ok"}, 20.0)]  # fmt: skip
    assert remaining_s([sample(3).job, disk], samples) == 25.0
    assert remaining_s([job(OPTIONS, "stall", "none", "there")], samples) == 10.0
    line = line_about(sample(1, wall_s=6.0), 2, 4, 90.0)
    assert line.startswith("[2/4] durable torch-save, ")
    assert "6.0 s" in line
    assert line.endswith("about 1.5 min left")
    assert "failed: because" in line_about(sample(1, "failed"), 2, 4, 0.0)


def test_forked_jobs_report_their_cpu_time_and_are_cut_off(tmp_path: Path) -> None:
    with Nursery(worker_environment()) as nursery:
        todo = job(OPTIONS, "durable", "torch-save", "", threads=1)
        found = run_one(todo, tmp_path / "job", nursery)
        assert found.result["status"] == "ok", found.result
        assert 0 < found.cpu_s < 60
        late = run_one(dataclasses.replace(todo, saves=10_000, timeout_s=1.0), tmp_path / "late", nursery)
        assert late.result["reason"].startswith("cut off after 1 s")
        broken = run_one(dataclasses.replace(todo, workload="nothing"), tmp_path / "broken", nursery)
        assert "exit status 1" in broken.result["reason"]
        assert "nothing" in broken.result["reason"]
        assert nursery._process is not None
        pid = nursery._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []
