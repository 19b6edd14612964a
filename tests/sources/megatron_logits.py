"""Save small models with Megatron-core over several ranks, or load them elsewhere and keep their logits.

Started by ``test_megatron_logits.py`` with torchrun.  ``MODE`` is ``save`` or ``logits``; ``CHECKPOINT`` holds one
folder for each of `FAMILIES`, ``OUT`` gets their logits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

LAYERS, WIDTH, HEADS, FFN, VOCABULARY, PADDED, LENGTH = 4, 32, 4, 48, 61, 64, 12
ROTARY = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False, "num_query_groups": 2}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}
# family -> (options of the configuration, options of the model, (tp, pp, ep) of the run that saves)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int, int]]] = {
    "llama": (ROTARY, {"position_embedding_type": "rope"}, (2, 2, 1)),
    "qwen2": ({**ROTARY, "add_qkv_bias": True}, {"position_embedding_type": "rope", "tied": True}, (2, 2, 1)),
    "qwen3": (
        {**ROTARY, "qk_layernorm": True, "kv_channels": 12},
        {"position_embedding_type": "rope"},
        (2, 2, 1),
    ),
    "gpt2": ({"gelu": "tanh"}, {"position_embedding_type": "learned_absolute", "tied": True}, (2, 2, 1)),
    "neox": ({"gelu": "none"}, {"position_embedding_type": "rope", "rotary_percent": 0.25}, (2, 2, 1)),
    "mixtral": ({**ROTARY, **EXPERTS}, {"position_embedding_type": "rope"}, (1, 2, 2)),
    "qwen2_moe": (
        {
            **ROTARY,
            **EXPERTS,
            "add_qkv_bias": True,
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 20,
            "moe_shared_expert_gate": True,
            "moe_ffn_hidden_size": 12,
        },
        {"position_embedding_type": "rope"},
        (1, 2, 2),
    ),
    "qwen3_moe": (
        {**ROTARY, **EXPERTS, "qk_layernorm": True, "kv_channels": 12, "moe_ffn_hidden_size": 12},
        {"position_embedding_type": "rope"},
        (2, 1, 2),
    ),
}


def build(torch: Any, family: str, degrees: tuple[int, int, int]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    options, model, _ = FAMILIES[family]
    gelu = options.get("gelu")
    act = partial(torch.nn.functional.gelu, approximate=gelu) if gelu else torch.nn.functional.silu
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        activation_func=act,
        tensor_model_parallel_size=degrees[0],
        pipeline_model_parallel_size=degrees[1],
        expert_model_parallel_size=degrees[2],
        expert_tensor_parallel_size=1,
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
        **{key: value for key, value in options.items() if key != "gelu"},
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(
            options.get("num_moe_experts"),
            qk_layernorm=options.get("qk_layernorm", False),
            normalization=options.get("normalization"),
        ),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=model.get("tied", False),
        **{key: value for key, value in model.items() if key != "tied"},
    )


def arguments(family: str) -> argparse.Namespace:
    options, model, _ = FAMILIES[family]
    return argparse.Namespace(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_query_groups=options.get("num_query_groups", HEADS),
        vocab_size=VOCABULARY,
        swiglu=options.get("gated_linear_unit", False),
        untie_embeddings_and_output_weights=not model.get("tied", False),
    )


def shake(torch: Any, model: Any) -> None:
    """Norms and biases that are not all ones and zeros, alike on all ranks that hold them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                count = torch.arange(parameter.numel(), dtype=torch.float32)
                parameter += 0.1 * torch.sin(count + sum(map(ord, name)))


def run(torch: Any, family: str, checkpoint: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    saves = os.environ["MODE"] == "save"
    world = torch.distributed.get_world_size()
    degrees = FAMILIES[family][2] if saves else (world, 1, 1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        degrees[0], degrees[1], expert_model_parallel_size=degrees[2], expert_tensor_parallel_size=1
    )
    torch.manual_seed(7)
    model = build(torch, family, degrees)
    folder = checkpoint / family
    if saves:
        shake(torch, model)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model.sharded_state_dict(), "iteration": 3, "args": arguments(family)}
        dist_checkpointing.save(state, str(folder))
        return
    found = sorted(folder.glob("iter_*")) or [folder]
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(found[0]))
    model.load_state_dict(loaded["model"])
    model.eval()
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens(torch), torch.arange(LENGTH).view(1, LENGTH), mask)
    if torch.distributed.get_rank() == 0:
        torch.save(logits[..., :VOCABULARY].contiguous(), Path(os.environ["OUT"]) / f"{family}.pt")


def tokens(torch: Any) -> Any:
    return torch.arange(LENGTH).view(1, LENGTH) * 5 % VOCABULARY


def main() -> None:
    from make_megatron import start

    torch = start({})
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # megatron-core 0.16 forgets it without Transformer Engine
    CudaRNGStatesTracker.fork = lambda self, *arguments: contextlib.nullcontext()
    for family in os.environ.get("FAMILY", " ".join(FAMILIES)).split():
        run(torch, family, Path(os.environ["CHECKPOINT"]))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
