"""Folders of Accelerate and of transformers' Trainer, as those leave them and as torch can write the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

import ckptengine as ce
from ckptengine.errors import Damaged, NotFound, StateMismatch, UnreadableFormat
from ckptengine.operations.diff import diff
from ckptengine.operations.opening import open_any
from ckptengine.sources.detect import open_source

from .test_deepspeed import ARCHIVE
from .trees import holds

Tensors = dict[str, torch.Tensor]


def trained(seed: int = 0, groups: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with decayed and other parameters in two groups, as Trainer makes them, after steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    rows = [[p for p in model.parameters() if (p.dim() == 2) == decayed] for decayed in (True, False)]
    listed: Any = [{"params": rows[0], "weight_decay": 0.1}, {"params": rows[1]}] if groups else model.parameters()
    optimizer = torch.optim.AdamW(listed, lr=0.01)
    for _ in range(2):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, suffix: str = "") -> Tensors:
    """What a source shows: weights by name, states by the optimizer's numbers."""
    found = {f"model{suffix}.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"optim{suffix}.{number}.{key}": value for key, value in state.items()}
    return found


def save_trainer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 2}, folder / "scheduler.pt")
    numpy_state = ("MT19937", np.arange(624, dtype=np.uint32), 5)
    rng = {"cpu": torch.get_rng_state(), "python": (3, None), "numpy": numpy_state}
    torch.save(rng, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 500, "epoch": 0.5}))


def test_a_trainers_folder(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_trainer(tmp_path / "out" / "checkpoint-500", model, optimizer)
    source = open_source(tmp_path / "out")
    assert (source.format, source.step) == ("huggingface", 500)
    holds(source, tensors_of(model, optimizer))
    values: Any = source.values()
    assert values["scheduler"] == {"last_epoch": 2}
    assert [group["weight_decay"] for group in values["optim"]["param_groups"]] == [0.1, 0.01]
    assert np.array_equal(values["rng_state"]["cpu"]["data"], torch.get_rng_state().numpy())


@pytest.mark.parametrize("to", ["native", "zarr", "dcp", "safetensors", "torch"])
def test_states_of_random_streams_stay_what_they_are(tmp_path: Path, to: str) -> None:
    """Arrays in tuples and small tensors among the values, in a process that has loaded no types of live state."""
    save_trainer(tmp_path / "in", *trained())
    command = [sys.executable, "-m", "ckptengine", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if to == "torch":  # what torch.load(weights_only=True) accepts: tensors, and arrays as lists
        rng = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["rng_state"]
        assert torch.equal(rng["cpu"], torch.get_rng_state())
        assert rng["numpy"] == ("MT19937", list(range(624)), 5)
    before, after = open_any(tmp_path / "in"), open_any(tmp_path / "out")
    differing = [value.path for value in diff(before, after).values]
    assert differing == (["rng_state.numpy.1"] if to == "torch" else [])
    values: Any = after.values()
    assert values["rng_state"]["cpu"]["data"].dtype == np.uint8


def test_a_large_tensor_in_a_tools_own_file_is_a_tensor(tmp_path: Path) -> None:
    save_trainer(tmp_path / "in", *trained())
    order = torch.arange(300_000)
    torch.save({"order": order, "epoch": 3}, tmp_path / "in" / "sampler.bin")
    with ce.open(tmp_path / "in") as checkpoint:
        assert torch.equal(checkpoint.read("sampler.order"), order)
        values: Any = checkpoint.values()
        assert values["sampler"] == {"epoch": 3}
        assert "rng_state" in values


@pytest.mark.parametrize("to", [None, "native", "zarr", "dcp", "torch"])
def test_a_live_job_resumes_by_the_order_of_parameters(tmp_path: Path, to: str | None) -> None:
    model, optimizer = trained()
    save_trainer(tmp_path / "checkpoint-500", model, optimizer)
    path = tmp_path / "checkpoint-500"
    if to is not None:
        ce.convert(path, tmp_path / "converted", to=to, verify=True)
        path = tmp_path / "converted"
    again, other = trained(1)
    assert ce.load({"model": again, "optim": other}, path) == (0 if to == "dcp" else 500)  # which records no step
    expected = tensors_of(model, optimizer)
    for name, tensor in tensors_of(again, other).items():
        assert torch.equal(tensor, expected[name]), name


def test_another_order_of_parameters_is_refused(tmp_path: Path) -> None:
    save_trainer(tmp_path / "checkpoint-500", *trained())
    model, optimizer = trained(1, groups=False)
    before = {name: tensor.clone() for name, tensor in tensors_of(model, optimizer).items()}
    with pytest.raises(StateMismatch, match=r"groups of \[2, 4\]; the live groups have \[6\]"):
        ce.load({"model": model, "optim": optimizer}, tmp_path)
    first = optimizer.param_groups[0]
    first["params"], rest = first["params"][:2], first["params"][2:]
    optimizer.add_param_group({"params": rest})
    with pytest.raises(StateMismatch, match=r"order in which it had them"):
        ce.load({"model": model, "optim": optimizer}, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model, optimizer).items())


def test_counters_that_are_numbers(tmp_path: Path) -> None:
    """As torch before 1.12, and others' optimizers to this day, keep them."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    for each in state["state"].values():
        each["step"] = int(each["step"])
    torch.save({"model": model.state_dict(), "optim": state}, tmp_path / "old.pt")
    source = open_source(tmp_path / "old.pt")
    counters = {f"optim.{number}.step": torch.tensor(2) for number in range(6)}
    holds(source, {**tensors_of(model, optimizer), **counters})
    assert set(source.values()["optim"]) == {"param_groups"}  # type: ignore[index]
    again, other = trained(1)
    for held in other.state.values():
        held["step"].fill_(9)
    ce.load({"model": again, "optim": other}, tmp_path / "old.pt")
    assert all(torch.equal(held["step"], torch.tensor(2.0)) for held in other.state.values())


def test_lightnings_names(tmp_path: Path) -> None:
    (model, optimizer), (_, second) = trained(), trained(1)
    content = {
        "pytorch-lightning_version": "2.6.6", "epoch": 1, "global_step": 7, "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict(), second.state_dict()], "lr_schedulers": [],
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    source = open_source(tmp_path / "last.ckpt")
    moments = {name: tensor for name, tensor in tensors_of(model, second, "_1").items() if name.startswith("optim")}
    holds(source, {**tensors_of(model, optimizer), **moments})
    assert source.step == 7
    assert {"optim", "optim_1", "epoch", "lr_schedulers"} <= set(source.values())  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore")
def test_sharded_folders_of_fsdp(tmp_path: Path) -> None:
    model, optimizer = trained()
    taken: tuple[Any, Any] = get_state_dict(model, optimizer)
    weights, states = taken
    save({"model": weights}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    save({"optimizer": states}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    torch.save({"step": 0}, tmp_path / "random_states_0.pkl")
    source = open_source(tmp_path)
    expected = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, state in states["state"].items():
        expected |= {f"optim.{name}.{key}": value for key, value in state.items()}
    holds(source, expected)
    values: Any = source.values()
    assert values["optim"]["param_groups"][0]["params"] == ["0.weight", "1.weight"]
    again, other = trained(1)
    ce.load({"model": again, "optim": other}, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_deepspeed_beside_a_copy_of_the_weights(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path / "zoo", filter="data")
    case = tmp_path / "zoo" / "zero1_dp3_fp16_tied" / "checkpoint"
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(case / "global_step3", folder / "global_step3")
    (folder / "latest").write_text("global_step3")
    torch.save({"gone": torch.zeros(3)}, folder / "pytorch_model.bin")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    plain, joined = open_source(case / "global_step3"), open_source(folder)
    assert joined.format == "huggingface"
    assert set(joined.names()) == set(plain.names())
    assert joined.aliases() == plain.aliases()
    with ce.open(folder) as a, ce.open(case / "global_step3") as b:
        assert all(torch.equal(a.read(name), b.read(name)) for name in a.names())


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    save_trainer(tmp_path / "checkpoint-500", *trained())
    torch.save({}, tmp_path / "checkpoint-500" / "pytorch_model_fsdp_rank0.bin")
    with pytest.raises(UnreadableFormat, match="LOCAL_STATE_DICT"):
        open_source(tmp_path)
    (tmp_path / "checkpoint-500" / "pytorch_model_fsdp_rank0.bin").unlink()
    (tmp_path / "checkpoint-500" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    with pytest.raises(NotFound, match=r"names 'b\.bin'"):
        open_source(tmp_path)
    (tmp_path / "checkpoint-500" / "pytorch_model.bin.index.json").unlink()
    (tmp_path / "checkpoint-500" / "trainer_state.json").write_text("{")
    with pytest.raises(Damaged, match=r"trainer_state\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_what_accelerate_writes(tmp_path: Path, safe: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    (model, optimizer), (second, other) = trained(), trained(1)
    model, optimizer, second, other = accelerator.prepare(model, optimizer, second, other)
    accelerator.save_state(str(tmp_path / "checkpoint_4"), safe_serialization=safe)
    source = open_source(tmp_path)
    inner = accelerator.unwrap_model(second), other.optimizer
    holds(source, {**tensors_of(accelerator.unwrap_model(model), optimizer.optimizer), **tensors_of(*inner, "_1")})
    assert "torch_manual_seed" in source.values()["random_states_0"]  # type: ignore[index]


@pytest.mark.filterwarnings("ignore")
def test_what_trainer_writes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        pytest.importorskip("accelerate", reason="needs accelerate")
        from .test_transformers import tiny_llama

        rows = [{"input_ids": torch.arange(at, at + 8) % 61, "labels": torch.arange(8)} for at in range(16)]
        settings = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = transformers.TrainingArguments(str(tmp_path / "out"), **settings)
        trainer = transformers.Trainer(tiny_llama(False), arguments, train_dataset=rows)
        trainer.train()
    source = open_source(tmp_path / "out")
    assert source.step == 2
    holds(source, tensors_of(trainer.model, trainer.optimizer.optimizer))
    model = tiny_llama(False)
    fresh = transformers.Trainer(model, arguments, train_dataset=rows).create_optimizer()
    ce.load({"model": model, "optim": fresh}, tmp_path / "out")
    expected = tensors_of(trainer.model, trainer.optimizer.optimizer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(model, fresh).items())
