"""Saved under one parallelism, restored under another: every element where it belongs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from .families import Parallel, Rank, build
from .simulated import restore_all, save_all

ALL = [
    Parallel("ddp"),
    *[Parallel("ddp", dp=n) for n in (2, 3)],
    *[Parallel("fsdp", dp=n) for n in (2, 3, 4, 5, 7, 8)],
    *[Parallel("hsdp", dp=n) for n in (4, 6)],
    *[Parallel("ddp", tp=n) for n in (2, 3, 4)],
    *[Parallel("ddp", tp=n, fused=True) for n in (2, 4)],
    *[Parallel("fsdp", dp=d, tp=t) for d, t in ((2, 2), (3, 2), (2, 3), (2, 4))],
    Parallel("hsdp", dp=4, tp=2),
    *[Parallel("ddp", pp=n) for n in (2, 4)],
    *[Parallel("ddp", dp=2, tp=t, pp=2, fused=f) for t, f in ((1, False), (2, False), (2, True))],
    *[Parallel("fsdp", dp=2, tp=2, pp=2)],
    *[Parallel("ddp", dp=d, ep=e) for d, e in ((2, 2), (4, 2), (4, 4), (8, 8))],
    Parallel("fsdp", dp=4, ep=2),
    *[Parallel("zero1", dp=n) for n in (2, 3, 5)],
    *[Parallel("zero2", dp=n) for n in (2, 4, 7)],
    *[Parallel("zero3", dp=n) for n in (2, 3, 8)],
    Parallel("zero1", dp=2, tp=2, pp=2),
    Parallel("zero1", dp=2, tp=2, fused=True),
    Parallel("ddp", dp=2, tp=4, fused=True),
]
SAMPLES = 24


def check(source: Parallel, target: Parallel, root: Path, vocabulary: int = 17) -> None:
    """Save ``source``, restore as ``target``, compare every local tensor bit by bit, padding included."""
    states = ("exp_avg", "momentum_buffer")
    save_all([one.state for one in build(source, vocabulary, states=states)], root)
    right, found = build(target, vocabulary, states=states), build(target, vocabulary, states=states)
    for one in found:
        one.clear()
        one.state["groups"][0]["lr"] = 7.0
    assert restore_all([one.state for one in found], root) == [1] * target.world
    for rank, (expected, filled) in enumerate(zip(right, found, strict=True)):
        compare(rank, expected, filled)
        assert filled.state["groups"] == expected.state["groups"]


def compare(rank: int, expected: Rank, filled: Rank) -> None:
    assert expected.tensors.keys() == filled.tensors.keys()
    for name, tensor in expected.tensors.items():
        bits = torch.int16 if tensor.dtype is torch.bfloat16 else torch.int32
        assert torch.equal(tensor.view(bits), filled.tensors[name].view(bits)), f"{name} on rank {rank}"


def pairs() -> list[tuple[Parallel, Parallel]]:
    """A walk in a fixed random order: the target of one pair is the source of the next."""
    mixed = random.Random(4)
    order = mixed.sample(ALL, len(ALL))
    return list(zip(order, [*order[1:], order[0]], strict=True))[:SAMPLES]


@pytest.mark.parametrize(("source", "target"), pairs(), ids=lambda one: str(one))
def test_any_parallelism_to_any(source: Parallel, target: Parallel, tmp_path: Path) -> None:
    check(source, target, tmp_path)


def test_heads_on_several_ranks_beside_others_of_their_own(tmp_path: Path) -> None:
    check(Parallel("ddp", dp=2, tp=4, fused=True), Parallel("ddp", tp=2, fused=True), tmp_path)


@pytest.mark.parametrize("vocabulary", [127, 31123])
def test_padded_vocabulary(vocabulary: int, tmp_path: Path) -> None:
    check(Parallel("ddp", tp=2, fused=True), Parallel("ddp", tp=4, pp=2, fused=True), tmp_path, vocabulary)
