"""DeepSpeed checkpoints as DeepSpeed wrote them, and what happens when they are damaged or incomplete."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptengine.errors import CheckpointError, Damaged, NotFound, RuleError, Truncated, UnreadableFormat
from ckptengine.sources.deepspeed.source import FORMAT
from ckptengine.sources.detect import FORMATS, open_source

from .reading import compare, read_bytes, truth_of_json

ARCHIVE = Path(__file__).parent / "data" / "deepspeed.tar.xz"
CASES = [
    "zero1_dp3_fp16_tied",
    "zero2_dp3_roundrobin",
    "zero1_dp2_fp32_sgd",
    "zero3_dp3_frozen_tied",
    "pipeline_pp2_dp1_tied",
]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Any:
    def make(case: str) -> Path:
        return Path(shutil.copytree(written / case / "checkpoint" / "global_step3", tmp_path / case))

    return make


def open_(path: Path, **options: Any) -> Any:
    formats = FORMATS if FORMAT in FORMATS else (FORMAT, *FORMATS)
    return open_source(path, formats=formats, **options)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_what_deepspeed_gathers(written: Path, case: str) -> None:
    source = open_(written / case / "checkpoint")
    assert (source.format, source.step) == ("deepspeed", 3)
    compare(source, truth_of_json(written / case / "truth.json"))


def test_ties_are_aliases_of_the_same_bytes(written: Path) -> None:
    source = open_(written / "zero1_dp3_fp16_tied" / "checkpoint")
    assert source.aliases() == {"model.head.weight": "model.embed.weight"}
    one, other = source.tensor("model.head.weight"), source.tensor("model.embed.weight")
    assert [(f.file, f.offset) for f in one.fragments] == [(f.file, f.offset) for f in other.fragments]


def test_values_keep_groups_by_name_and_what_the_user_saved(written: Path) -> None:
    values = open_(written / "zero2_dp3_roundrobin" / "checkpoint").values()
    assert (values["note"], values["iteration"], values["global_steps"]) == ("seven", 3, 3)
    groups = values["optim"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert "embed.weight" in groups[0]["params"]
    assert "blocks.0.norm.bias" in groups[1]["params"]
    third = open_(written / "zero3_dp3_frozen_tied" / "checkpoint").values()["optim"]["param_groups"]
    assert [group["lr"] for group in third] == [0.01, 0.01]
    assert "position" not in third[0]["params"]


def test_opening_reads_no_tensor(written: Path) -> None:
    source = open_(written / "zero2_dp3_roundrobin" / "checkpoint")
    tensor = source.tensor("optim.embed.weight.exp_avg")
    assert {fragment.file.partition("zero_pp_rank")[0] for fragment in tensor.fragments} == {"bf16_"}
    assert len(read_bytes(source.files, tensor)) == tensor.nbytes


@pytest.mark.parametrize(
    ("case", "file", "error"),
    [
        ("zero1_dp3_fp16_tied", "zero_pp_rank_1_mp_rank_00_optim_states.pt", NotFound),
        ("zero1_dp3_fp16_tied", "zero_pp_rank_2_mp_rank_00_optim_states.pt", NotFound),
        ("zero3_dp3_frozen_tied", "zero_pp_rank_1_mp_rank_00_model_states.pt", NotFound),
        ("zero3_dp3_frozen_tied", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", NotFound),
        ("pipeline_pp2_dp1_tied", "mp_rank_00_model_states.pt", NotFound),
    ],
)
def test_a_missing_file_is_named(copy: Any, case: str, file: str, error: type[CheckpointError]) -> None:
    folder = copy(case)
    (folder / file).unlink()
    named = f" {file};" if "optim_states" in file else r"zero_pp_rank_\d|mp_rank 00|optimizer files"
    with pytest.raises(error, match=named):
        open_(folder)


def test_files_of_another_run_between_them(copy: Any) -> None:
    folder = copy("zero1_dp3_fp16_tied")
    shutil.copy(
        folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt", folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(UnreadableFormat, match="another run"):
        open_(folder)


def test_cut_off_files(copy: Any) -> None:
    folder = copy("zero2_dp3_roundrobin")
    victim = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    victim.write_bytes(victim.read_bytes()[:-700])
    with pytest.raises((Truncated, Damaged), match="rank_1"):
        open_(folder)


def test_every_short_or_scrambled_header_is_a_clear_error(copy: Any) -> None:
    folder = copy("zero1_dp2_fp32_sgd")
    victim = folder / "mp_rank_00_model_states.pt"
    data = victim.read_bytes()
    for cut in range(0, len(data), len(data) // 40):
        victim.write_bytes(data[:cut] + b"\xff" * 3 + data[cut + 3 :])
        try:
            source = open_(folder)
            for name in source.names():
                source.tensor(name)
            source.values()
        except CheckpointError:
            continue


def test_tensor_parallel_pieces_are_refused_without_rules(copy: Any) -> None:
    folder = copy("zero1_dp2_fp32_sgd")
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / path.name.replace("mp_rank_00", "mp_rank_01"))
    with pytest.raises(UnreadableFormat, match="another pipeline stage"):
        open_(folder)
    with pytest.raises(RuleError, match="no rule says"):
        open_(pretending(folder, tp=2))


def test_tensor_parallel_pieces_with_rules(copy: Any, tmp_path: Path) -> None:
    """Two equal ranks: what the rules say decides how the copies make a whole."""
    folder = copy("zero1_dp2_fp32_sgd")
    one = {name: open_(folder).tensor(name).shape for name in open_(folder).names()}
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / path.name.replace("mp_rank_00", "mp_rank_01"))
    header = folder / "mp_rank_00_model_states.pt"
    assert b"checkpoint_parallel_dimensions" in header.read_bytes()
    rules = tmp_path / "rules.toml"
    rules.write_text(
        "version = 1\n[[rule]]\nmatch = 'embed\\.weight|head\\.weight'\nshard = 0\n"
        "[[rule]]\nmatch = 'position'\naveraged = true\n[[rule]]\nmatch = 'seen|blocks.*'\nreplicated = true\n"
    )
    with pytest.raises(UnreadableFormat, match="tensor-parallel"):
        open_(pretending(folder, tp=3), rules=rules)
    source = open_(pretending(folder, tp=2), rules=rules)
    assert source.tensor("optim.embed.weight.master").shape == (2 * one["model.embed.weight"][0], 11)
    assert source.tensor("model.seen").shape == (4,)
    mean, plain = source.tensor("optim.position.master"), open_(copy2(folder)).tensor("optim.position.master")
    assert read_bytes(source.files, mean) == read_bytes(open_(copy2(folder)).files, plain)
    rules.write_text("version = 1\n[[rule]]\nmatch = '.*'\nshard = 0\n[[rule]]\nmatch = 'typo'\nshard = 0\n")
    with pytest.raises(RuleError, match="typo"):
        open_(folder.with_name(folder.name + "_2"), rules=rules)


def copy2(folder: Path) -> Path:
    """The same checkpoint with one model-parallel rank."""
    single = folder.with_name(folder.name + "_single")
    if not single.exists():
        shutil.copytree(folder, single, ignore=shutil.ignore_patterns("*mp_rank_01*"))
    return single


def pretending(folder: Path, tp: int) -> Path:
    """The same checkpoint whose model files say that ``tp`` tensor-parallel ranks wrote it."""
    import zipfile

    made = folder.with_name(f"{folder.name}_{tp}")
    shutil.copytree(folder, made)
    for path in made.glob("*model_states.pt"):
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in records.items():
                if name.endswith("data.pkl"):
                    old = b"tp_degree" + data.partition(b"tp_degree")[2][:4]
                    at = old.index(b"K\x01")
                    data = data.replace(old, old[:at] + b"K" + bytes([tp]) + old[at + 2 :])
                archive.writestr(name, data)
    return made


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched-by-a-pickle"),))


def test_nothing_in_a_pickle_runs(copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    folder = copy("zero1_dp2_fp32_sgd")
    state = {"module": {"w": torch.ones(2)}, "param_shapes": None, "client": Evil(), "global_steps": 1}
    for path in folder.iterdir():
        path.unlink()
    torch.save(state, folder / "mp_rank_00_model_states.pt", pickle_protocol=pickle.DEFAULT_PROTOCOL)
    source = open_(folder)
    assert list(source.names()) == ["model.w"]
    source.values()
    assert not list(tmp_path.glob("touched*"))
