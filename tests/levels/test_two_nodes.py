"""Two nodes: network namespaces joined by a cable, each with a directory that only its own rank can see.

What they have in common is the root.  Needs the right to make namespaces; skipped with the reason elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptengine as ce

from .jobs import is_exactly, state_of

JOB = Path(__file__).with_name("job.py")
WITHIN_S = 120.0
PORT = 29577


@dataclasses.dataclass(frozen=True)
class Node:
    """A network namespace with an address, and the directory that is mounted as its own."""

    namespace: str
    device: str
    address: str
    folder: Path


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, ip and unshare")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not permitted here")
    name = secrets.token_hex(3)
    pair = [Node(f"ckpt-{name}-{i}", f"ck{name}{i}", f"10.213.77.{i + 1}", tmp_path / f"node-{i}") for i in range(2)]
    try:
        for node in pair:
            node.folder.mkdir()
            ip("netns", "add", node.namespace)
        ip("link", "add", pair[0].device, "type", "veth", "peer", "name", pair[1].device)
        for node in pair:
            ip("link", "set", node.device, "netns", node.namespace)
            ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.device)
            ip("-n", node.namespace, "link", "set", node.device, "up")
            ip("-n", node.namespace, "link", "set", "lo", "up")
        yield pair
    finally:
        for node in pair:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True, check=False)


def train(nodes: list[Node], local: Path, root: Path, steps: int) -> list[tuple[str, str]]:
    """Train up to ``steps`` with one rank on each node; what each said, and its log."""
    local.mkdir(exist_ok=True)
    jobs = []
    for rank, node in enumerate(nodes):
        facts = {"RANK": rank, "WORLD_SIZE": len(nodes), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
        facts |= {"MASTER_ADDR": nodes[0].address, "GLOO_SOCKET_IFNAME": node.device, "OMP_NUM_THREADS": 1}
        job = [sys.executable, str(JOB), str(root), str(steps), "--tier", str(local), "--every", "2"]
        alone = [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            'mount --bind "$1" "$2" && shift 2 && exec "$@"',
        ]
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node.namespace, *alone, "sh", str(node.folder), str(local), *job],
                env={**os.environ, **{key: str(value) for key, value in facts.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [job.communicate(timeout=WITHIN_S) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (_, errors) in zip(jobs, told, strict=True):
        assert job.returncode == 0, errors[-3000:]
    return told


def used(log: str, step: int) -> dict[str, int]:
    """Bytes by the place that a restore took them from."""
    line = re.search(rf"step {step} was restored: (.*)", log)
    assert line is not None, log[-3000:]
    return {place: int(size) for size, place in re.findall(r"(\d+) bytes from ([^,]+)", line[1])}


def test_a_node_that_came_back_empty_restores_from_the_root(tmp_path: Path, nodes: list[Node]) -> None:
    root, local = tmp_path / "root", tmp_path / "local"
    for said, _ in train(nodes, local, root, 4):
        assert "restored 0" in said
        assert "durable 4" in said
    for rank, node in enumerate(nodes):
        files = sorted(path.name[:10] for path in node.folder.glob("step-000000004/rank-*"))
        assert files == [f"rank-{rank:05d}"], "each node has what its own rank wrote, and no more"
        assert list(node.folder.glob("step-000000004/manifest-*")), "and a manifest of its own"
    assert not list(local.iterdir()), "nobody else sees it"
    assert ce.steps(root) == [2, 4]

    shutil.rmtree(nodes[1].folder)
    nodes[1].folder.mkdir()
    (first, log_0), (second, log_1) = train(nodes, local, root, 8)
    for said in (first, second):
        assert "restored 4" in said, "the job itself checks that it is exact"
        assert "durable 8" in said
    assert str(local) in used(log_0, 4), "the other node still used its own"
    assert set(used(log_1, 4)) == {str(root)}, "the empty one had only the root"
    assert sorted(path.name[:10] for path in nodes[1].folder.glob("step-000000008/rank-*")) == ["rank-00001"]
    assert ce.steps(root)[-1] == 8
    state = state_of(0)
    assert ce.load(state, root) == 8
    assert is_exactly(state, 8)
    assert not any(path.name.startswith(".") for folder in (root, *(n.folder for n in nodes))
                   for path in folder.glob("step-*/*"))  # fmt: skip
