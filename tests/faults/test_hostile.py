"""Manifests, attempt records and rank files that are whole by their digests and say impossible things."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptengine as ce
from ckptengine import native
from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.store import envelope, rankfile

from .states import blank, differences, state_of

ODD: list[Any] = [
    None, True, -1, 0, 1, 1 << 62, 1 << 70, 0.5, "", "..", "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]],
    [1 << 40], [1 << 62, 1 << 62], {"kind": "?"}, "crc64nvme:zz", [-1], ["x"] * 3,
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    ce.save(state_of(1), made, 1)
    return made


def manifest_path(root: Path) -> Path:
    return next((root / "step-000000001").glob("manifest-*"))


def body_of(path: Path) -> Any:
    return json.loads(path.read_bytes().partition(b"\n")[2])


def use_everything(root: Path) -> None:
    """Every reading call, in the hope of a traceback of a random type."""
    with ce.open(root, 1) as checkpoint:
        for name in checkpoint.names():
            checkpoint.shape(name)
            checkpoint.dtype(name)
            checkpoint.digest(name)
            checkpoint.read(name)
        checkpoint.values()
        checkpoint.verify()
    state = blank()
    ce.load(state, root, 1)
    assert differences(state, 1) == []


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes of a JSON document."""
    found = [path]
    values = enumerate(document) if isinstance(document, list) else ()
    children = document.items() if isinstance(document, dict) else values
    for key, child in children:
        found += places(child, (*path, key))
    return found


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def test_any_node_of_a_manifest_replaced(root: Path) -> None:
    """300 sealed manifests with one node replaced: an error of ours, or a load of exactly the right bytes."""
    path = manifest_path(root)
    good = body_of(path)
    nodes = [node for node in places(good) if node]
    dice = random.Random(5)
    for _ in range(300):
        node, value = dice.choice(nodes), dice.choice(ODD)
        bad = copy.deepcopy(good)
        put(bad, node, value)
        path.write_bytes(envelope.seal("manifest", bad))
        try:
            use_everything(root)
        except CheckpointError:
            pass
        except AssertionError:
            # A forged value or name that is well-formed is what the state then holds; tensors' bytes never differ.
            assert node[0] in ("values", "aliases", "metrics"), f"{node} = {value!r}"
        except Exception as error:
            pytest.fail(f"{node} = {value!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda body: body.update(world=1 << 50), "rank files"),
        (lambda body: body["tensors"].append(["../x", "float32", [1 << 60, 1 << 60], 0, 0, "0" * 16]), None),
        (lambda body: [row.__setitem__(2, [1 << 45]) for row in body["tensors"]], None),
        (lambda body: body.update(files=[[1 << 62, "0" * 16]]), "bytes"),
        (lambda body: body.update(step=2), "step"),
        (lambda body: body.update(granule=1 << 40), "granule"),
    ],
)
def test_absurd_claims(root: Path, change: Callable[[Any], Any], match: str | None) -> None:
    path = manifest_path(root)
    body = body_of(path)
    change(body)
    path.write_bytes(envelope.seal("manifest", body))
    with pytest.raises(CheckpointError, match=match):
        use_everything(root)


def test_a_newer_version_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest_path(root)
    body = body_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(envelope, "VERSION", (2, 0))
        path.write_bytes(envelope.seal("manifest", body))
    with pytest.raises(UnreadableFormat, match="upgrade"):
        ce.open(root, 1)
    with monkeypatch.context() as patch:
        patch.setattr(envelope, "VERSION", (1, 7))
        path.write_bytes(envelope.seal("manifest", {**body, "a later key": 1}))
    use_everything(root)


def test_json_that_is_too_deep_or_not_json(root: Path) -> None:
    path = manifest_path(root)
    header = b'{"version":[1,0],"bytes":1}\n1'
    for data in (b"", b"\n", b"{}\n{}", b"[" * 100_000, b"\xff\xfe\n", header, os.urandom(5000)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            ce.open(root, 1)
    body = b"[" * 50_000 + b"]" * 50_000
    facts: dict[str, object] = {"ckptengine": "manifest", "version": [1, 0], "bytes": len(body)}
    digest = native.digest(envelope.canonical(facts) + b"\n" + body)
    path.write_bytes(envelope.canonical({**facts, "digest": digest}) + b"\n" + body)
    with pytest.raises(CheckpointError):
        ce.open(root, 1)


def test_any_field_of_a_rank_file_s_tail_replaced(root: Path) -> None:
    """Index records and footers with absurd numbers, their digests made right all the way up to the manifest."""
    path = next((root / "step-000000001").glob("rank-*"))
    original, body = path.read_bytes(), body_of(manifest_path(root))
    tail = rankfile.decode_tail(original[footer_of(original).index :], len(original), "rank file")
    dice = random.Random(9)
    numbers = [0, 1, 63, 4095, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, len(original), len(original) - 8]
    for _ in range(200):
        index = tail.index.copy()
        row, name = dice.randrange(len(index)), dice.choice(["tensor", "piece", "offset", "nbytes", "crc"])
        value = dice.choice(numbers) % (1 << (32 if name in ("tensor", "piece") else 64))
        if int(index[name][row]) == value:
            continue
        index[name][row] = value
        granules = np.frombuffer(original[tail.table : footer_of(original).index], "<u8")
        _, encoded = rankfile.encode_tail(tail.table, index, granules, tail.values)
        path.write_bytes(original[: footer_of(original).index] + encoded)
        body["files"][0] = [path.stat().st_size, f"{native.crc64(encoded):016x}"]
        manifest_path(root).write_bytes(envelope.seal("manifest", body))
        with pytest.raises(CheckpointError):
            use_everything(root)


def footer_of(data: bytes) -> rankfile.Footer:
    return rankfile.decode_footer(data[-rankfile.FOOTER_BYTES :], len(data), "rank file")


def test_any_node_of_an_attempt_record_replaced(root: Path) -> None:
    records = sorted((root / "attempts").glob("*.json"))
    good = body_of(records[0])
    nodes = [node for node in places(good) if node]
    for node in nodes:
        for value in ODD:
            bad = copy.deepcopy(good)
            put(bad, node, value)
            for path in records:
                path.write_bytes(envelope.seal("attempt", bad))
            try:
                ce.steps(root)
            except CheckpointError:
                continue
            except Exception as error:
                pytest.fail(f"{node} = {value!r}: {type(error).__name__}: {error}")
