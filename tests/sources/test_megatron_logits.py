"""Models of Megatron-core become models of transformers with the same logits, and the other way round."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest

from ckptengine.operations.convert import convert

from .test_megatron_loads import torchrun

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("megatron", "transformers"))
NEEDED = pytest.mark.skipif(not INSTALLED, reason="megatron-core and transformers are not installed")
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ROTARY = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# family -> (transformers' class without its ending, its configuration, preset there, preset back)
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("Llama", ROTARY, "megatron-to-llama", "llama-to-megatron"),
    "qwen2": ("Qwen2", {**ROTARY, "tie_word_embeddings": True}, "megatron-to-llama", "llama-to-megatron"),
    "qwen3": ("Qwen3", {**ROTARY, "head_dim": 12}, "megatron-to-llama", "llama-to-megatron"),
    "gpt2": (
        "GPT2",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 12, "n_inner": 48},
        "megatron-to-gpt2",
        "gpt2-to-megatron",
    ),
    "neox": (
        "GPTNeoX",
        {
            **SIZES,
            "intermediate_size": 48,
            "max_position_embeddings": 12,
            "use_parallel_residual": False,
            "rotary_pct": 0.25,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
        "megatron-to-neox",
        "neox-to-megatron",
    ),
    "mixtral": (
        "Mixtral",
        {**ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2},
        "megatron-to-mixtral",
        "mixtral-to-megatron",
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **ROTARY,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 1,
        },
        "megatron-to-qwen3-moe",
        "qwen3-moe-to-megatron",
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **ROTARY,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
        "megatron-to-qwen3-moe",
        "qwen3-moe-to-megatron",
    ),
}
LOCAL = """version = 1
extends = "{preset}"
[[rule]]
about = "what megatron-core's layers without Transformer Engine call it"
match = 'model\\.layers\\.(?P<layer>\\d+)\\.post_attention_layernorm\\.weight'
rename = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
stack = "layer"
"""


def config_of(family: str) -> Any:
    import transformers

    name, options, _, _ = MODELS[family]
    return getattr(transformers, f"{name}Config")(**options)


def class_of(family: str) -> Any:
    import transformers

    name = MODELS[family][0]
    return getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(12).view(1, 12) * 5 % 61).logits


def alike(family: str, found: Any, wanted: Any) -> None:
    import torch

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=lambda text: f"{family}: {text}")


@NEEDED
@pytest.mark.timeout(300)
def test_transformers_gives_megatrons_logits(tmp_path: Path) -> None:
    """Tensor, pipeline and expert parallel ranks of Megatron -> safetensors under others' names -> transformers."""
    import torch

    torchrun("megatron_logits.py", 4, {}, tmp_path / "saved", tmp_path, "save")
    torchrun("megatron_logits.py", 1, {}, tmp_path / "saved", tmp_path, "logits")
    for family, (_, _, preset, _) in MODELS.items():
        target = tmp_path / "converted" / family
        target.parent.mkdir(exist_ok=True)
        convert(tmp_path / "saved" / family, target, to="safetensors", rules=preset)
        config_of(family).save_pretrained(target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = class_of(family).from_pretrained(target, output_loading_info=True)
        assert not report["missing_keys"], (family, report)
        assert not report["unexpected_keys"], (family, report)
        expected = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        assert expected.abs().max() > 1
        alike(family, logits_of(model), expected)


@NEEDED
@pytest.mark.timeout(300)
def test_megatron_gives_transformers_logits(tmp_path: Path) -> None:
    """transformers' own models -> Megatron on two tensor-parallel ranks, whose vocabulary is padded."""
    import torch

    expected = {}
    for family, (_, _, _, preset) in MODELS.items():
        torch.manual_seed(3)
        model = class_of(family)(config_of(family))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        expected[family] = logits_of(model)
        model.save_pretrained(tmp_path / "saved" / family)
        rules = preset
        if "moe" in preset or "mixtral" in preset:
            rules = str(tmp_path / f"{family}.toml")
            Path(rules).write_text(LOCAL.format(preset=preset))
        (tmp_path / "converted").mkdir(exist_ok=True)
        convert(tmp_path / "saved" / family, tmp_path / "converted" / family, to="megatron", rules=rules)
    torchrun("megatron_logits.py", 2, {}, tmp_path / "converted", tmp_path, "logits")
    for family, wanted in expected.items():
        found = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        assert wanted.abs().max() > 0.5
        alike(family, found, wanted)
