"""What is written for DeepSpeed, read again here and resumed by DeepSpeed itself on other numbers of ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptengine.errors import UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.sources.detect import open_source
from ckptengine.sources.torchrecords import cast

from ..tiers.services import free_port
from .reading import read_bytes, truth_of_safetensors

ARCHIVE = Path(__file__).parent / "data" / "deepspeed.tar.xz"
FLOATS = ("optim.",)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


def contents(source: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name in source.names():
        tensor = source.tensor(name)
        found[name] = (tensor.dtype, tensor.shape, read_bytes(source.files, tensor))
    return found


@pytest.mark.parametrize("case", ["zero1_dp3_fp16_tied", "zero3_dp3_frozen_tied", "zero1_dp2_fp32_sgd"])
@pytest.mark.parametrize(
    ("to", "layout"),
    [
        ("deepspeed", None),
        ("deepspeed", "dp=2,zero=1"),
        ("deepspeed", "dp=5,zero=2"),
        ("deepspeed", "dp=4,zero=3"),
        ("deepspeed-universal", None),
        ("deepspeed-universal", "zero=3"),
        ("deepspeed-universal", "zero=2"),
    ],
)
def test_written_and_read_again(written: Path, tmp_path: Path, case: str, to: str, layout: str | None) -> None:
    source = open_source(written / case / "checkpoint")
    if (to, layout) == ("deepspeed-universal", "zero=3") and case.endswith("sgd"):
        with pytest.raises(UnusableRequest, match="ZeRO-3 takes exp_avg and exp_avg_sq"):
            convert(source, tmp_path / "target", to=to, layout=layout)
        return
    plan = convert(source, tmp_path / "target", to=to, layout=layout)
    made = open_source(tmp_path / "target")
    before, after = contents(source), contents(made)
    assert set(after) == set(before)
    assert made.step == 3
    assert dict(made.aliases()) == dict(source.aliases())
    stage3 = layout is not None and "zero=3" in layout
    for name, held in before.items():
        if stage3 and f"optim.{name.removeprefix('model.')}.master" in before:
            held = before[f"optim.{name.removeprefix('model.')}.master"]
        if stage3 and name in made.aliases():
            continue
        assert after[name] == held, name
    values: Any = made.values()
    assert values["note"] == "seven"
    assert [group["params"] for group in values["optim"]["param_groups"]] == [
        group["params"] for group in source.values()["optim"]["param_groups"]
    ]
    size = sum(path.stat().st_size for path in (tmp_path / "target").rglob("*") if path.is_file())
    assert plan.write_bytes <= size <= plan.write_bytes + 8192


def test_sub_groups_of_zero3(written: Path, tmp_path: Path) -> None:
    source = open_source(written / "zero3_dp3_frozen_tied" / "checkpoint")
    options = {"sub_group_size": 100}
    convert(source, tmp_path / "target", to="deepspeed", layout="dp=2,zero=3", options=options)
    made = open_source(tmp_path / "target")
    assert contents(made) == contents(source)
    assert [len(group["params"]) for group in made.values()["optim"]["param_groups"]] == [4, 7]


def test_what_cannot_be_written(written: Path, tmp_path: Path) -> None:
    source = open_source(written / "zero1_dp2_fp32_sgd" / "checkpoint")
    for to, layout in (("deepspeed", "tp=2"), ("deepspeed-universal", "pp=2")):
        with pytest.raises(UnusableRequest, match=layout[:2]):
            convert(source, tmp_path / "target", to=to, layout=layout)
    with pytest.raises(UnusableRequest, match="sub_group_size"):
        convert(source, tmp_path / "target", to="deepspeed", layout="zero=3", options={"sub_group_size": 0})
    with pytest.raises(UnusableRequest, match="frozen"):
        convert(source, tmp_path / "target", to="deepspeed", options={"frozen": "("})
    assert not (tmp_path / "target").exists()


def test_casts_equal_torchs() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(3).integers(0, 1 << 32, 20000, dtype=np.uint64).astype("<u4")
    wide = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch.float32)
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, dtype in names.items():
        narrow = wide.to(dtype)
        data = bytearray(narrow.view(torch.int16).numpy().tobytes())
        ours = np.frombuffer(cast(bytearray(bits.tobytes()), "float32", name), "<u2")
        theirs = np.frombuffer(data, "<u2")
        same = (ours == theirs) | wide.isnan().numpy()
        assert same.all(), name
        back = cast(data, name, "float32")
        expected = narrow.float()
        assert torch.equal(torch.frombuffer(bytearray(back), dtype=torch.float32).nan_to_num(), expected.nan_to_num())


INSTALLED = importlib.util.find_spec("deepspeed") is not None and importlib.util.find_spec("safetensors") is not None


@pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "to", "layout", "ranks", "options"),
    [
        ("zero3_dp3_frozen_tied", "deepspeed", "dp=2,zero=1", 2, {"stage": 1, "frozen": True, "tied": True}),
        ("zero3_dp3_frozen_tied", "deepspeed", "dp=2,zero=3", 2, {"stage": 3, "frozen": True, "tied": True}),
        ("zero1_dp3_fp16_tied", "deepspeed", "dp=2,zero=3", 2, {"stage": 3, "dtype": "fp16", "tied": True}),
        ("zero1_dp3_fp16_tied", "deepspeed", "dp=4,zero=2", 4, {"stage": 2, "dtype": "fp16", "tied": True}),
        ("zero1_dp2_fp32_sgd", "deepspeed", "dp=3,zero=1", 3, {"stage": 1, "dtype": "fp32", "optimizer": "sgd"}),
        ("zero3_dp3_frozen_tied", "deepspeed-universal", None, 2, {"stage": 1, "frozen": True, "tied": True}),
        ("zero1_dp3_fp16_tied", "deepspeed-universal", None, 2, {"stage": 3, "dtype": "fp16", "tied": True}),
        ("zero1_dp3_fp16_tied", "deepspeed-universal", "zero=3", 2, {"stage": 3, "dtype": "fp16", "tied": True}),
    ],
)
def test_deepspeed_resumes(
    written: Path, tmp_path: Path, case: str, to: str, layout: str | None, ranks: int, options: dict[str, Any]
) -> None:
    source = open_source(written / case / "checkpoint")
    convert(source, tmp_path / "target", to=to, layout=layout)
    options = {**options, "universal": to.endswith("universal")}
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OPTIONS": json.dumps(options)}
    environment |= {"CHECKPOINT": str(tmp_path / "target"), "OUT": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master_port={free_port()}",
    ]
    script = str(Path(__file__).with_name("resume_deepspeed.py"))
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=280)
    if done.returncode and "is not supported on your device" in done.stderr:
        pytest.skip("DeepSpeed refuses fp16 on this processor")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "notes.json").read_text()) == {"note": "seven", "steps": 3}
    loaded, truth = truth_of_safetensors(tmp_path / "loaded.safetensors"), contents(source)
    compared = [name for name in loaded if name in truth and name.startswith("optim.")]
    assert {name for name in truth if name.startswith("optim.")} == set(compared)
    made = truth_of_safetensors(tmp_path / "loaded.safetensors")
    import hashlib

    for name in compared:
        assert made[name][2] == hashlib.sha256(truth[name][2]).hexdigest(), name
