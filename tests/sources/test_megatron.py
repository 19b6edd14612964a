"""Megatron checkpoints as Megatron-core wrote them, and what happens when they are damaged or incomplete."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptengine.cli.verify import main as verify_command
from ckptengine.errors import CheckpointError, Damaged, DigestMismatch, NotFound, RuleError, Truncated, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment
from ckptengine.operations.verify import verify
from ckptengine.sources.detect import FORMATS, open_source
from ckptengine.sources.megatron.flattened import elements, is_flattened, turned, unflatten
from ckptengine.sources.megatron.source import FORMAT
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.rules.present import present

from .reading import compare, read_bytes, truth_of_json

ARCHIVE = Path(__file__).parent / "data" / "megatron.tar.xz"
FLAT = "flat_tp2_dp2"
LEGACY = ["legacy_tp2_dp2_distopt", "legacy_tp2_pp2"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Any:
    def make(case: str) -> Path:
        return Path(shutil.copytree(written / case / "checkpoint", tmp_path / case))

    return make


def open_(path: Path, **options: Any) -> Any:
    formats = FORMATS if FORMAT in FORMATS else (FORMAT, *FORMATS)
    return open_source(path, formats=formats, **options)


def agrees(source: Any, truth: Path) -> None:
    """Equal to the truth, which lacks steps only."""
    compare(source, truth_of_json(truth), exact=False)
    rest = set(source.names()) - set(truth_of_json(truth))
    assert all(name.endswith(".step") for name in rest), sorted(rest)[:3]
    for name in rest:
        data = read_bytes(source.files, source.tensor(name))
        assert data == b"\0\0\x40\x40", f"{name} is not 3.0"


def test_flattened_optimizer_states_get_their_shapes_back(written: Path) -> None:
    source = open_(written / FLAT / "checkpoint")
    assert (source.format, source.step) == ("megatron", 3)
    agrees(source, written / FLAT / "truth.json")
    assert source.values()["args"]["swiglu"] is True


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_ranks_with_the_preset(written: Path, case: str) -> None:
    source = open_(written / case / "checkpoint", rules="megatron-gpt")
    assert (source.format, source.step) == ("megatron", 3)
    agrees(source, written / case / "truth.json")
    groups = source.values()["optim"]["param_groups"]
    weights = [group for group in groups if group["wd_mult"] == 1.0]
    assert any(name.endswith("linear_fc1.weight") for group in weights for name in group["params"])


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Written by Megatron-core 0.12: experts fused for one matrix product, on two expert-parallel ranks of dp 4."""
    with tarfile.open(ARCHIVE.with_name("megatron_experts.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "flat_experts"


def test_flattened_states_of_fused_experts_lie_the_other_way_round(experts: Path) -> None:
    """Their matrices are square, so that nothing but the fp32 copies tells."""
    agrees(open_(experts / "checkpoint"), experts / "truth.json")


def test_flattened_states_of_experts_that_no_order_explains(experts: Path) -> None:
    folder = experts / "checkpoint"
    source = open_(folder)
    name = next(name for name in source.names() if ".experts." in name and name.endswith("fc1.weight.master"))
    fragment = source.tensor(name).fragments[0]
    victim = folder / fragment.file
    data = bytearray(victim.read_bytes())
    data[fragment.offset + 3] ^= 0x80
    victim.write_bytes(data)
    with pytest.raises(UnreadableFormat, match=r"experts\.linear_fc1.* in what order; .*megatron-weights"):
        open_(folder).tensor(name)


def test_legacy_ranks_without_rules_are_refused(written: Path) -> None:
    with pytest.raises(RuleError, match="megatron-gpt"):
        open_(written / "legacy_tp2_pp2" / "checkpoint")


def test_llama_names_from_legacy_and_back_to_stacked_ones(written: Path) -> None:
    source = open_(written / "legacy_tp2_pp2" / "checkpoint", rules="megatron-gpt")
    view = present(source, load_rules("megatron-to-llama:vocab=29"))
    assert view.tensor("model.model.embed_tokens.weight").shape == (29, 8)
    assert view.tensor("model.model.layers.3.self_attn.k_proj.weight").shape == (4, 8)
    assert view.tensor("optim.model.layers.3.mlp.up_proj.weight.exp_avg").shape == (12, 8)
    again = present(view, load_rules("llama-to-megatron:heads=4,query_groups=2"))
    fused = again.tensor("model.decoder.layers.self_attention.linear_qkv.weight")
    assert fused.shape == (4, 16, 8)
    rows = [source.tensor(f"model.decoder.layers.{layer}.self_attention.linear_qkv.weight") for layer in range(4)]
    assert read_bytes(again.files, fused) == b"".join(read_bytes(source.files, row) for row in rows)


def test_a_missing_rank_is_named(copy: Any) -> None:
    folder = copy("legacy_tp2_pp2")
    shutil.rmtree(folder / "iter_0000003" / "mp_rank_01_000")
    with pytest.raises(NotFound, match="tensor-parallel rank 1, pipeline rank 0"):
        open_(folder, rules="megatron-gpt")


def test_a_missing_shard_file_is_named(copy: Any) -> None:
    folder = copy(FLAT)
    victim = next(folder.glob("__1_0.distcp"))
    victim.unlink()
    source = open_(folder)
    with pytest.raises(NotFound, match="__1_0"):
        [read_bytes(source.files, source.tensor(name)) for name in source.names()]


def test_other_versions_and_backends_are_refused(copy: Any) -> None:
    folder = copy(FLAT)
    for manifest, said in (({"sharded_backend": "zarr"}, "zarr"), ({"sharded_backend": "torch_dist"}, "version None")):
        (folder / "metadata.json").write_text(json.dumps(manifest))
        with pytest.raises(UnreadableFormat, match=said):
            open_(folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").unlink()
    with pytest.raises(NotFound, match="not finished"):
        open_(folder)


def test_a_missing_last_rank_is_named_too(copy: Any) -> None:
    """No folder's number tells that there was another; the arguments do."""
    folder = copy("legacy_tp2_dp2_distopt")
    shutil.rmtree(folder / "iter_0000003" / "mp_rank_01")
    with pytest.raises(NotFound, match=r"tensor-parallel rank 1.*1 of 2 ranks"):
        open_(folder, rules="megatron-gpt")


def test_ranks_of_different_iterations_are_refused(copy: Any) -> None:
    torch = pytest.importorskip("torch")
    folder = copy("legacy_tp2_pp2")
    victim = folder / "iter_0000003" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(victim, weights_only=False)
    torch.save({**state, "iteration": 2}, victim)
    with pytest.raises(Damaged, match=r"mp_rank_01_001.* is of iteration 2, but .* of iteration 3"):
        open_(folder, rules="megatron-gpt")


def test_a_missing_or_damaged_manifest_is_named(copy: Any) -> None:
    """The rest would be read as a checkpoint of torch DCP, under other names and without the optimizer's shapes."""
    folder = copy(FLAT)
    (folder / "metadata.json").write_bytes(b"\0" * 119)
    with pytest.raises(Damaged, match=r"metadata\.json is damaged"):
        open_(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(NotFound, match=r"no metadata\.json"):
        open_(folder)


def with_checksums(folder: Path) -> None:
    """As Megatron-core writes them when it is asked to."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))


def test_recorded_checksums_are_verified(copy: Any, capsys: Any) -> None:
    folder = copy(FLAT)
    assert verify_command([str(folder)]) == 0
    assert "records no digests" not in capsys.readouterr().out, "its zips have CRCs"
    with_checksums(folder)
    told: list[tuple[int, int]] = []
    assert verify(open_(folder), lambda done, total: told.append((done, total))) == ([], 0)
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "integrity.json")
    assert told[-1] == (nbytes, nbytes)
    assert verify_command([str(folder)]) == 0
    assert "records no digests" not in capsys.readouterr().out
    source = open_(folder)
    fragment = source.tensor("model.decoder.layers.mlp.linear_fc1.weight").fragments[0]
    victim = folder / fragment.file
    data = bytearray(victim.read_bytes())
    data[fragment.offset] ^= 1
    victim.write_bytes(data)
    for rules in (None, "megatron-to-llama"):
        (problem,), _ = verify(open_source(folder, rules=rules))
        assert isinstance(problem, DigestMismatch)
        assert victim.name in str(problem)
    lost = next(path for path in folder.glob("*.distcp") if path != victim)
    lost.unlink()
    problems, _ = verify(open_(folder))
    assert any(isinstance(problem, NotFound) and lost.name in str(problem) for problem in problems)
    assert any(isinstance(problem, DigestMismatch) for problem in problems)
    assert verify_command([str(folder)]) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", Damaged), ("[]", UnreadableFormat), ('{"algorithm": "md5", "files": {}}', UnreadableFormat)],
)
def test_checksums_that_cannot_be_read(copy: Any, text: str, error: type[Exception]) -> None:
    folder = copy(FLAT)
    (folder / "integrity.json").write_text(text)
    with pytest.raises(error, match=r"integrity\.json"):
        verify(open_(folder))


def test_a_cut_off_rank_file(copy: Any) -> None:
    folder = copy("legacy_tp2_dp2_distopt")
    victim = folder / "iter_0000003" / "mp_rank_01" / "distrib_optim.pt"
    victim.write_bytes(victim.read_bytes()[:-900])
    with pytest.raises((Truncated, Damaged), match="mp_rank_01"):
        open_(folder, rules="megatron-gpt")


def test_an_optimizer_that_does_not_fit_is_refused(copy: Any) -> None:
    """Another rank's buffers are refused where their length tells, never mapped on a guess."""
    folder = copy("legacy_tp2_dp2_distopt") / "iter_0000003"
    torch = pytest.importorskip("torch")
    state = torch.load(folder / "mp_rank_01" / "distrib_optim.pt", weights_only=False)
    for states in state[0].values():
        for key in ("param", "exp_avg", "exp_avg_sq"):
            states[key] = states[key][:-64].clone()
    torch.save(state, folder / "mp_rank_01" / "distrib_optim.pt")
    with pytest.raises(UnreadableFormat, match="torch_dist"):
        open_(folder, rules="megatron-gpt")


def test_scrambled_headers_are_clear_errors(copy: Any) -> None:
    folder = copy("legacy_tp2_dp2_distopt") / "iter_0000003"
    victim = folder / "mp_rank_00" / "model_optim_rng.pt"
    data = victim.read_bytes()
    for cut in range(0, len(data), len(data) // 30):
        victim.write_bytes(data[:cut] + b"\xff" * 3 + data[cut + 3 :])
        try:
            open_(folder, rules="megatron-gpt").values()
        except CheckpointError:
            continue


def test_unflatten_against_a_grid() -> None:
    """A [4, 6] tensor of 2 x 3 local [2, 2] tensors, one of which is cut into runs of 1 and 3."""
    assert is_flattened((2, 3, 4), (4, 6))
    assert not is_flattened((2, 3, 5), (4, 6))
    one = unflatten("t", "float32", (4, 6), (2, 3, 4), Fragment(Box((1, 2, 0), (1, 1, 1)), "f", 100))
    rest = unflatten("t", "float32", (4, 6), (2, 3, 4), Fragment(Box((1, 2, 1), (1, 1, 3)), "g", 0))
    assert one == [Fragment(Box((2, 4), (1, 1)), "f", 100)]
    assert rest == [Fragment(Box((2, 5), (1, 1)), "g", 0), Fragment(Box((3, 4), (1, 2)), "g", 4)]
    with pytest.raises(Damaged):
        unflatten("t", "float32", (4, 6), (2, 3, 4), Fragment(Box((0, 0, 0), (2, 1, 4)), "f", 0))


def test_unflatten_what_lies_the_other_way_round() -> None:
    """Two experts' [6, 4], each kept as [4, 6] in memory and cut in half along the columns of that."""
    shape, stored = (2, 6, 4), (2, 1, 2, 12)
    assert is_flattened(stored, turned(shape))
    found = unflatten("t", "float32", shape, stored, Fragment(Box((1, 0, 1, 3), (1, 1, 1, 6)), "f", 8), True)
    assert found == [Fragment(Box((1, 3, 1), (1, 3, 2)), "f", 8, (6, 1, 3))]
    assert sorted(elements(found[0], 64, 4), key=lambda at: at[1]) == [
        ((1, 3 + n % 3, 1 + n // 3), 8 + 4 * n) for n in range(6)
    ]
    assert len(list(elements(found[0], 4, 4))) == 4
