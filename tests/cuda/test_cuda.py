"""State on CUDA devices: captured on an own stream, restored through host memory.  Skipped where there is no device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine import native

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

WITHIN_S = 120.0


def _state(device: str, *, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.BatchNorm1d(1024), torch.nn.Linear(1024, 256))
    model.to(device)
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), fused=True)}


def _train(state: dict[str, Any], device: str) -> None:
    loss = state["model"](torch.randn(32, 256, device=device)).square().mean()
    loss.backward()
    state["optim"].step()
    state["optim"].zero_grad()


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    found = [tensor.detach().cpu() for tensor in state["model"].state_dict().values()]
    for entry in state["optim"].state_dict()["state"].values():
        found += [value.detach().cpu() for value in entry.values()]
    return found


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_step_is_saved_while_training_goes_on(tmp_path: Path) -> None:
    state = _state("cuda")
    truth: dict[int, list[torch.Tensor]] = {}
    with ce.Checkpointer(state, tmp_path) as checkpointer:
        for step in range(1, 6):
            _train(state, "cuda")
            truth[step] = _tensors(state)
            checkpointer.save(step)
    for step, wanted in truth.items():
        fresh = _state("cuda", seed=1)
        assert ce.load(fresh, tmp_path, step) == step
        assert _equal(_tensors(fresh), wanted)


def test_a_stream_of_its_own_is_ordered_after_the_compute_stream(tmp_path: Path) -> None:
    tensor = torch.zeros(64 << 20, device="cuda")
    with ce.Checkpointer({"t": torch.nn.Parameter(tensor)}, tmp_path) as checkpointer:
        torch.cuda._sleep(200_000_000)  # the write below is queued, not done, when save is called
        tensor.fill_(3.0)
        assert checkpointer.save(1).result(WITHIN_S) == 1
    assert bool((ce.open(tmp_path).read("t") == 3.0).all())


def test_views_and_other_dtypes(tmp_path: Path) -> None:
    base = torch.arange(24.0, device="cuda").reshape(4, 6)
    state = {"whole": base, "columns": base[:, 1:4], "turned": base.T}
    state |= {"bf16": base.to(torch.bfloat16), "zero": base[0, 0]}
    ce.save(state, tmp_path, 1)
    checkpoint = ce.open(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor.cpu()), name


def test_on_the_gpu_and_back_on_the_cpu(tmp_path: Path) -> None:
    state = _state("cuda")
    _train(state, "cuda")
    ce.save(state, tmp_path, 1)
    fresh = _state("cpu", seed=1)
    fresh["optim"] = torch.optim.AdamW(fresh["model"].parameters())
    ce.load(fresh, tmp_path)
    assert _equal(_tensors(fresh), _tensors(state))


def test_random_streams_of_every_device(tmp_path: Path) -> None:
    with ce.Checkpointer({"x": torch.zeros(1)}, tmp_path) as checkpointer:
        torch.randn(3, device="cuda")
        checkpointer.save(1).result(WITHIN_S)
        wanted = torch.randn(8, device="cuda").cpu()
        checkpointer.restore()
        assert torch.equal(torch.randn(8, device="cuda").cpu(), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
def test_several_devices(tmp_path: Path) -> None:
    state = {f"d{i}": torch.full((1 << 20,), float(i), device=f"cuda:{i}") for i in range(torch.cuda.device_count())}
    ce.save(state, tmp_path, 1)
    for name, tensor in state.items():
        assert torch.equal(ce.open(tmp_path).read(name), tensor.cpu())


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_the_arena_is_pinned() -> None:
    assert native.cuda_available()
    engine = native.Engine(workers=1, buffers=2, pin=True)
    try:
        assert engine.pinned
    finally:
        engine.close()
