"""What is written for Megatron, read again here and loaded by Megatron-core itself under other parallelism."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ckptengine.errors import RuleError, UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.sources.detect import open_source

from ..tiers.services import free_port
from .reading import read_bytes, truth_of_safetensors

ARCHIVE = Path(__file__).parent / "data" / "megatron.tar.xz"
FLAT = "flat_tp2_dp2"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


def contents(source: Any) -> dict[str, tuple[str, tuple[int, ...], str]]:
    found = {}
    for name in source.names():
        tensor = source.tensor(name)
        digest = hashlib.sha256(read_bytes(source.files, tensor)).hexdigest()
        found[name] = (tensor.dtype, tensor.shape, digest)
    return found


@pytest.mark.parametrize(("layout", "master"), [(None, "fp32_param"), ("dp=3", "param"), ("tp=2,pp=2", "fp32_param")])
def test_written_and_read_again(written: Path, tmp_path: Path, layout: str | None, master: str) -> None:
    source = open_source(written / FLAT / "checkpoint")
    convert(source, tmp_path / "target", to="megatron", layout=layout, options={"master": master})
    made = open_source(tmp_path / "target")
    assert (made.format, made.step) == ("megatron", 3)
    assert contents(made) == contents(source)
    before, after = source.values(), made.values()
    assert after["args"] == before["args"]
    groups = [values["optimizer"]["optimizer"]["param_groups"] for values in (after, before)]
    assert [{**group, "step": 3.0} for group in groups[0]] == groups[1]


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,pp=1", "tp=4,pp=2", "tp=2,pp=4", "pp=2,vpp=2"])
def test_legacy_weights(written: Path, tmp_path: Path, layout: str) -> None:
    source = open_source(written / "legacy_tp2_pp2" / "checkpoint", rules="megatron-gpt")
    convert(source, tmp_path / "target", to="megatron", layout=layout, options={"legacy": True})
    made = open_source(tmp_path / "target", rules="megatron-gpt")
    before = {name: held for name, held in contents(source).items() if name.startswith("model.")}
    assert contents(made) == before
    ranks = sorted(path.name for path in (tmp_path / "target" / "iter_0000003").iterdir())
    degrees = dict(item.split("=") for item in layout.split(","))
    assert len(ranks) == int(degrees.get("tp", 1)) * int(degrees.get("pp", 1))


@pytest.mark.parametrize(("layout", "ranks"), [("tp=1", 1), ("ep=2", 2), ("tp=2,ep=2", 4), ("tp=2,ep=2,etp=1", 2)])
def test_legacy_experts(tmp_path: Path, layout: str, ranks: int) -> None:
    """Experts over fewer tensor-parallel ranks than the rest: a rank has some whole ones."""
    with tarfile.open(ARCHIVE.with_name("megatron_buckets.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    source = open_source(tmp_path / "tiny_legacy_moe" / "checkpoint", rules="megatron-gpt")
    convert(source, tmp_path / "target", to="megatron", layout=layout, options={"legacy": True})
    made = open_source(tmp_path / "target", rules="megatron-gpt")
    assert contents(made) == {name: held for name, held in contents(source).items() if name.startswith("model.")}
    assert len(list((tmp_path / "target" / "iter_0000003").iterdir())) == ranks


def test_legacy_weights_of_stacked_layers(written: Path, tmp_path: Path) -> None:
    """One tensor of torch_dist for all layers, each layer of it on the stage that it belongs to."""
    source = open_source(written / FLAT / "checkpoint")
    convert(source, tmp_path / "target", to="megatron", layout="tp=2,pp=2,vpp=2", options={"legacy": True})
    made = open_source(tmp_path / "target", rules="megatron-gpt")
    key = "self_attention.linear_qkv.weight"
    stacked = source.tensor(f"model.decoder.layers.{key}")
    layers = [made.tensor(f"model.decoder.layers.{layer}.{key}") for layer in range(stacked.shape[0])]
    assert b"".join(read_bytes(made.files, layer) for layer in layers) == read_bytes(source.files, stacked)
    with zipfile.ZipFile(tmp_path / "target" / "iter_0000003" / "mp_rank_01_001" / "model_optim_rng.pt") as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    assert b"model0" in pickled
    assert b"model1" in pickled
    with pytest.raises(UnusableRequest, match="vpp"):
        convert(source, tmp_path / "other", to="megatron", layout="vpp=2", options={"legacy": True})


def test_the_form_of_the_optimizer_is_said(written: Path, tmp_path: Path) -> None:
    """Megatron asks a checkpoint for its optimizer in the form that the checkpoint says it has."""
    source = open_source(written / FLAT / "checkpoint")
    for master, form in (("param", "fully_reshardable"), ("fp32_param", None)):
        convert(source, tmp_path / master, to="megatron", options={"master": master})
        content = open_source(tmp_path / master).values()["content_metadata"]
        assert content.get("distrib_optim_sharding_type") == form
        assert content["singleton_local_shards"] is False
        assert content["chained_optim_avoid_prefix"] is True


@pytest.mark.parametrize(
    ("case", "master", "wraps"),
    [
        ("legacy_tp2_pp2", "fp32_param", False),
        ("legacy_tp2_pp2", "param", True),
        (FLAT, "fp32_param", True),
        (FLAT, "param", True),
    ],
)
def test_only_an_optimizer_of_fp32_weights_wraps_nothing(
    written: Path, tmp_path: Path, case: str, master: str, wraps: bool
) -> None:
    """Megatron looks for the groups where the optimizer that it builds has them, not where the source had."""
    source = open_source(written / case / "checkpoint", rules="megatron-gpt" if "legacy" in case else None)
    convert(source, tmp_path / "target", to="megatron", options={"master": master})
    values = open_source(tmp_path / "target").values()["optimizer"]
    assert ("optimizer" in values) == wraps
    inner = values["optimizer"] if wraps else values
    assert len(inner["param_groups"]) == 2
    assert all("wd_mult" in group for group in inner["param_groups"])
    assert all(("step" in group) == (master == "param") for group in inner["param_groups"])
    assert values.get("param_state_sharding_type") == ("fully_reshardable" if master == "param" else None)


def test_what_cannot_be_written(written: Path, tmp_path: Path) -> None:
    source = open_source(written / "legacy_tp2_pp2" / "checkpoint", rules="megatron-gpt")
    target = tmp_path / "target"
    with pytest.raises(UnusableRequest, match="4 layers do not divide into 3"):
        convert(source, target, to="megatron", layout="pp=3", options={"legacy": True})
    with pytest.raises(RuleError, match="does not divide over 3"):
        convert(source, target, to="megatron", layout="tp=3", options={"legacy": True})
    with pytest.raises(UnusableRequest, match="0 experts do not divide into ep=2"):
        convert(source, target, to="megatron", layout="ep=2", options={"legacy": True})
    with pytest.raises(UnusableRequest, match="master"):
        convert(source, target, to="megatron", options={"master": "other"})
    assert not target.exists()


INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("megatron", "safetensors"))


def torchrun(script: str, ranks: int, options: dict[str, Any], checkpoint: Path, out: Path, mode: str = "") -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPTIONS": json.dumps(options), "PYTHONWARNINGS": "ignore"}
    environment |= {"CHECKPOINT": str(checkpoint), "OUT": str(out), "MODE": mode}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master_port={free_port()}",
    ]
    path = str(Path(__file__).with_name(script))
    done = subprocess.run([*command, path], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not INSTALLED, reason="megatron-core is not installed")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {"bf16": True, "swiglu": True}),
        (4, {"tp": 2, "pp": 2, "bf16": True, "swiglu": True}),
        (4, {"tp": 4, "bf16": True, "swiglu": True}),
        (2, {"bf16": True, "swiglu": True, "distributed": "fully_reshardable"}),
        (4, {"tp": 2, "bf16": True, "swiglu": True, "distributed": "fully_reshardable"}),
    ],
)
def test_megatron_loads(written: Path, tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    source = open_source(written / FLAT / "checkpoint")
    master = "param" if "distributed" in options else "fp32_param"
    convert(source, tmp_path / "target", to="megatron", options={"master": master})
    torchrun("resume_megatron.py", ranks, options, tmp_path / "target" / "iter_0000003", tmp_path)
    loaded = truth_of_safetensors(tmp_path / "loaded.safetensors")
    truth = contents(source)
    steps = {name for name in truth if name.endswith(".step")}
    assert set(loaded) == set(truth) - steps
    for name, (dtype, shape, digest) in loaded.items():
        assert (dtype, tuple(shape), digest) == truth[name], name


@pytest.mark.skipif(not INSTALLED, reason="megatron-core is not installed")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        (["ep=1"], {}),
        (["ep=1"], {"distributed": "fully_reshardable"}),
        (["ep=1", "ep=2"], {"ep": 2}),
        (["ep=1", "ep=2"], {"ep": 2, "distributed": "fully_reshardable"}),
    ],
)
def test_megatron_loads_experts(tmp_path: Path, layouts: list[str], options: dict[str, Any]) -> None:
    """Of a chain of optimizers into one, and the other way round."""
    with tarfile.open(ARCHIVE.with_name("megatron_buckets.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    source = before = open_source(tmp_path / "tiny_moe_buckets" / "checkpoint")
    for layout in layouts:
        convert(source, tmp_path / layout, to="megatron", layout=layout, options={"master": "param"})
        source = open_source(tmp_path / layout)
    if "distributed" not in options:
        convert(source, tmp_path / "plain", to="megatron")
    folder = tmp_path / (layouts[-1] if "distributed" in options else "plain") / "iter_0000003"
    tiny = {"layers": 2, "width": 4, "heads": 2, "ffn": 6, "padded": 8, "bf16": True, "swiglu": True, "experts": 2}
    torchrun("resume_megatron.py", 2, {**tiny, **options}, folder, tmp_path)
    loaded = truth_of_safetensors(tmp_path / "loaded.safetensors")
    assert {name: held for name, held in contents(before).items() if not name.endswith(".step")} == {
        name: (dtype, tuple(shape), digest) for name, (dtype, shape, digest) in loaded.items()
    }
