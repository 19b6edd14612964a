"""Save a small rotary GPT with Megatron-core over several ranks, or load it on one and keep its logits.

Started by ``test_megatron_loads.py`` with torchrun; ``MODE`` is ``save`` or ``logits``, ``OPTIONS`` have tp and pp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from make_megatron import start

LAYERS, WIDTH, HEADS, GROUPS, FFN, VOCABULARY, PADDED, LENGTH = 4, 32, 4, 2, 48, 61, 64, 12


def build(torch: Any, options: dict[str, Any]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig

    CudaRNGStatesTracker.fork = lambda self, *arguments: contextlib.nullcontext()
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        init_method_std=0.2,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def tokens(torch: Any) -> Any:
    return torch.arange(LENGTH).view(1, LENGTH) * 5 % VOCABULARY


def main() -> None:
    options = json.loads(os.environ["OPTIONS"])
    torch = start(options)
    from megatron.core import dist_checkpointing

    model, checkpoint = build(torch, options), os.environ["CHECKPOINT"]
    if os.environ["MODE"] == "save":
        arguments = argparse.Namespace(
            num_layers=LAYERS, num_attention_heads=HEADS, num_query_groups=GROUPS, vocab_size=VOCABULARY, swiglu=True
        )
        state = {"model": model.sharded_state_dict(), "iteration": 3, "args": arguments}
        dist_checkpointing.save(state, checkpoint)
        return
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)["model"])
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens(torch), torch.arange(LENGTH).view(1, LENGTH), mask)
    torch.save(logits[..., :VOCABULARY], Path(os.environ["OUT"]) / "logits.pt")


if __name__ == "__main__":
    main()
