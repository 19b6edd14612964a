"""Presets on checkpoints that transformers itself writes; skipped where it is not installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.detect import open_source
from ckptengine.sources.rules.assemble import Assembler
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.parse import load_rules

from .memory import MemoryFiles, stored
from .reading import read_bytes
from .trees import holds

SIZES = {"vocab_size": 62, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen2": ("llama", "Qwen2", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen3": ("llama", "Qwen3", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}),
    "mistral": ("llama", "Mistral", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", "Mixtral", {**SIZES, "intermediate_size": 40, "num_local_experts": 4}),
    "gpt2": ("gpt2", "GPT2", {"vocab_size": 62, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "neox": ("neox", "GPTNeoX", {**SIZES, "intermediate_size": 40}),
}
# How tensor parallelism cuts a parameter, by the end of its name: (dimension, equal fused parts).  All else is whole.
CUTS = {
    "gpt2": {
        "c_attn.weight": (1, 3), "c_attn.bias": (0, 3), "c_fc.weight": (1, 1), "c_fc.bias": (0, 1),
        "c_proj.weight": (0, 1), "lm_head.weight": (0, 1),
    },
    "neox": {
        "query_key_value.weight": (0, 1), "query_key_value.bias": (0, 1), "h_to_4h.weight": (0, 1),
        "h_to_4h.bias": (0, 1), "attention.dense.weight": (1, 1), "4h_to_h.weight": (1, 1),
        "embed_in.weight": (0, 1), "embed_out.weight": (0, 1), "lm_head.weight": (0, 1),
    },
    "llama": {
        **{f"{name}_proj.{kind}": (0, 1) for name in ("q", "k", "v", "gate", "up") for kind in ("weight", "bias")},
        "o_proj.weight": (1, 1), "down_proj.weight": (1, 1), "lm_head.weight": (0, 1),
    },
}  # fmt: skip
CUTS["mixtral"] = CUTS["llama"] | {
    "w1.weight": (0, 1),
    "w3.weight": (0, 1),
    "w2.weight": (1, 1),
    "experts.gate_up_proj": (1, 2),
    "experts.down_proj": (2, 1),
}


def made(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        transformers.logging.set_verbosity_error()
        _, family, sizes = MODELS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        found = [name for name in (f"{family}ForCausalLM", f"{family}LMHeadModel") if hasattr(transformers, name)]
        return getattr(transformers, found[0])(config).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_every_parameter_cut_over_two_ranks_comes_back(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    preset = MODELS[kind][0]
    model.save_pretrained(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    stored_names = {name.removeprefix("model."): source.tensor(name) for name in source.names()}
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}  # in memory experts are fused
    for name, tensor in stored_names.items():
        raw = np.frombuffer(read_bytes(source.files, tensor), tensor.dtype).reshape(tensor.shape)
        if name in arrays:
            assert (raw == arrays[name]).all()
        arrays[name] = raw
    files = MemoryFiles()
    averages = AveragedFiles(files)
    assembler = Assembler(load_rules(preset), list(arrays), {}, averages)
    for name, array in arrays.items():
        cuts = [cut for end, cut in CUTS[preset].items() if name.endswith(end)]
        pieces = [stored(files, f"{name}/{rank}", part) for rank, part in enumerate(cut_in_two(array, cuts))]
        whole = assembler.whole(name, pieces)
        raw = read_bytes(averages, LogicalTensor(name, whole.dtype, whole.shape, whole.fragments))
        assert raw == array.tobytes(), name


def cut_in_two(array: np.ndarray, cuts: list[tuple[int, int]]) -> list[np.ndarray]:
    if not cuts:
        return [array, array]
    dim, parts = cuts[0]
    halves = [np.split(part, 2, axis=dim) for part in np.split(array, parts, axis=dim)]
    return [np.ascontiguousarray(np.concatenate([half[rank] for half in halves], axis=dim)) for rank in (0, 1)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_bin_files_with_ties(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    holds(source, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert bool(source.aliases()) == tied
