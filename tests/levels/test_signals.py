"""SIGTERM in the middle of every stage: the last save goes as far as the deadline allows, and the exit is clean."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptengine as ce

from .jobs import folder_of, is_exactly, state_of

JOB = Path(__file__).with_name("job.py")
CAP = 600_000
"""Bytes per second at which a step of the job takes about half a second."""


def start(script: Path, *arguments: object, ranks: int = 1) -> subprocess.Popen[bytes]:
    """Its output is read without a buffer: `until` takes no more than the lines it returns, the rest is `finish`'s."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=environment,
    )


def until(job: subprocess.Popen[bytes], wanted: Callable[[str], bool]) -> list[str]:
    """The lines that the job has said up to the first that is wanted."""
    assert job.stdout is not None
    said = []
    for line in job.stdout:
        said.append(line.decode().strip())
        if wanted(said[-1]):
            return said
    errors = job.stderr.read().decode() if job.stderr else ""
    pytest.fail(f"the job ended without it: {said[-5:]} {errors[-3000:]}")


def last_steps(errors: str) -> list[int]:
    """The steps that ranks say they ended with, durable."""
    return [int(step) for step in re.findall(r"SIGTERM: step (\d+) is durable", errors)]


def finish(job: subprocess.Popen[bytes], within_s: float) -> tuple[list[str], str]:
    try:
        out, err = job.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        job.kill()
        out, err = job.communicate()
        pytest.fail(f"the job did not end in {within_s} s: {err.decode()[-3000:]}")
    return [line.strip() for line in out.decode().splitlines()], err.decode()


def stage_is(root: Path, memory: Path, disk: Path, stage: str) -> bool:
    """Whether a save is in the middle of a stage, as the directories show it."""
    folders = {"landing": memory, "to disk": disk, "to root": root}
    folder = folders[stage]
    if stage == "landing":
        return any(path.name.startswith("rank-") for path in folder.glob("step-*/*"))
    return any(folder.glob("step-*/.partial-*"))


@pytest.mark.parametrize("stage", ["training", "landing", "to disk", "to root"])
def test_sigterm_in_each_stage(tmp_path: Path, memory: str, stage: str) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    arguments = [root, 100_000, "--tier", f"{memory},2", "--tier", f"{disk},2,{CAP}", "--every", 2, "--pause", 0.05]
    job = start(JOB, *arguments, "--sigterm", 30)
    said = until(job, lambda line: line.startswith("trained"))
    deadline_s = time.monotonic() + 20
    while stage != "training" and not stage_is(root, folder_of(memory), disk, stage):
        assert time.monotonic() < deadline_s, f"never {stage}"
        time.sleep(0.001)
    job.send_signal(signal.SIGTERM)
    more, errors = finish(job, 40)
    assert job.returncode == 143, errors
    assert "Traceback" not in errors
    said += more
    (last,) = last_steps(errors)
    assert ce.steps(root)[-1] == last
    trained = max(int(line.split()[1]) for line in said if line.startswith("trained"))
    assert last == trained + 1, "the step of the last hook call, which does not return"
    state = state_of(0)
    assert ce.load(state, root) == last
    assert is_exactly(state, last)


def test_a_deadline_that_is_too_short_leaves_the_rest_to_the_next_job(tmp_path: Path, memory: str) -> None:
    root = tmp_path / "root"
    tiers = ["--tier", memory, "--tier", f"{tmp_path / 'disk'},,20000"]
    job = start(JOB, root, 100_000, *tiers, "--every", 1000, "--pause", 0.05, "--sigterm", 2.5)
    said = until(job, lambda line: line.startswith("trained"))
    job.send_signal(signal.SIGTERM)
    more, errors = finish(job, 20)
    assert job.returncode == 143, errors
    assert "the deadline of 2.5 s came while step" in errors
    assert ce.steps(root) == []
    (last,) = ce.steps(folder_of(memory))
    assert last == max(int(line.split()[1]) for line in said + more if line.startswith("trained")) + 1
    state = state_of(0)
    places = [ce.Tier(memory), ce.Tier(tmp_path / "disk")]
    with ce.Checkpointer(state, root, tiers=places, random=False) as checkpointer:
        assert checkpointer.restore() == last
        assert is_exactly(state, last)
    assert ce.steps(root) == [last], "what was left in memory was carried on"


def test_sigterm_under_torchrun(tmp_path: Path, memory: str) -> None:
    """Signalled through the launcher, which passes it on to both ranks: they end at one step, which is durable."""
    root = tmp_path / "root"
    job = start(JOB, root, 100_000, "--tier", memory, "--every", 5, "--pause", 0.05, "--sigterm", 20, ranks=2)
    until(job, lambda line: line.startswith("durable"))
    job.send_signal(signal.SIGTERM)
    said, errors = finish(job, 60)
    one, other = last_steps(errors)
    trained = [int(line.split()[1]) for line in said if line.startswith("trained")]
    assert one == other == max(trained) + 1 == ce.steps(root)[-1]
    state = state_of(0)
    assert ce.load(state, root) == one
    assert is_exactly(state, one)
