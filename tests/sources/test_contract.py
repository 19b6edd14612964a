"""Every format keeps the contract of sources: on what we write, and on the frameworks' own where they lie around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine
from ckptengine.operations.convert import convert
from ckptengine.operations.opening import open_any
from ckptengine.sources.port import Source

from .contract import SourceContract
from .reading import FIXTURES
from .trees import counting

FORMATS = ("torch", "safetensors", "dcp", "zarr")
FOUND = sorted(str(path.relative_to(FIXTURES)) for path in FIXTURES.glob("*/*/checkpoint"))


def state() -> dict[str, Any]:
    weight = counting(7, 3)
    parameters = {"w": {"exp_avg": counting(7, 3), "step": torch.tensor(3.0)}}
    return {
        "model": {"w": weight, "tied": weight, "t": counting(4, 5).t(), "empty": torch.zeros(0, 2)},
        "optim": {"state": parameters, "param_groups": [{"params": ["w"], "lr": 0.1, "betas": (0.9, 0.99)}]},
        "note": {"deep": [1, {"x": None}], "raw": b"xy"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("contract")
    torch.save(state(), made / "source.pt")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    live = {"model": model, "optim": optimizer, "tied": {"a": model.weight, "b": counting(2)}, "note": {"x": (1, {2})}}
    ckptengine.save(live, made / "native", 7)
    for name in FORMATS:
        convert(made / "source.pt", made / name, to=name)
    return made


class TestWritten(SourceContract):
    @pytest.fixture(params=["source.pt", "native", *FORMATS])
    def source(self, folder: Path, request: pytest.FixtureRequest) -> Source:
        return open_any(folder / request.param)


@pytest.mark.skipif(not FOUND, reason="no checkpoints of the frameworks beside the repository")
class TestFrameworks(SourceContract):
    @pytest.fixture(params=FOUND or ["none"])
    def source(self, request: pytest.FixtureRequest) -> Source:
        return open_any(FIXTURES / request.param)
