"""Safetensors that we write load into transformers with the same logits; skipped where it is not installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptengine.operations.convert import convert
from ckptengine.sources.detect import open_source

from .trees import holds


def tiny_llama(tied: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5_000_000, 9_000])
@pytest.mark.filterwarnings("ignore")
def test_the_same_logits(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    model = tiny_llama(tied)
    tokens = torch.arange(7)[None]
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    convert(tmp_path / "a", tmp_path / "b.dcp", to="dcp")
    convert(tmp_path / "b.dcp", tmp_path / "c", to="safetensors", options={"shard_bytes": shard_bytes}, verify=True)
    again = type(model).from_pretrained(tmp_path / "c")
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if tied:  # transformers stores a tied weight once
        del own["model.lm_head.weight"]
    holds(open_source(tmp_path / "c"), own)
