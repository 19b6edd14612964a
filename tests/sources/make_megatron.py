"""Write small checkpoints with Megatron-core itself, and beside each the truth that its own sharding metadata gives.

Needs megatron-core (CPU is enough).  ``python tests/sources/make_megatron.py OUT [CASE ...]`` starts one torchrun per
case and writes ``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.safetensors`` (canonical name -> tensor).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ODD = {"layers": 3, "width": 15, "heads": 3, "ffn": 11, "padded": 31, "untied": True}
TINY = {"layers": 2, "width": 4, "heads": 2, "ffn": 6, "padded": 8, "bf16": True}
CHUNKS_ALONE = {
    "bucket": 10000,
    "ddp": {"overlap_param_gather": True},
    "optim": {"overlap_param_gather": True, "overlap_param_gather_with_optimizer_step": True},
}
"""The first virtual stage has an optimizer of its own."""
# case -> (ranks, options)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dist_tp2_pp2_swiglu": (4, {"tp": 2, "pp": 2, "swiglu": True, "groups": 2, "untied": True}),
    "dist_tp2_dp2_fp32": (4, {"tp": 2}),
    "dist_tp2_dp2_bf16": (4, {"tp": 2, "bf16": True}),
    "dist_tp2_dp2_optimizer": (4, {"tp": 2, "bf16": True, "distributed": "fully_reshardable", "swiglu": True}),
    "dist_dp2_dp_reshardable": (2, {"bf16": True, "distributed": "dp_reshardable"}),
    "dist_vpp2_pp2": (2, {"pp": 2, "vpp": 2, "bf16": True}),
    "dist_moe_ep2": (2, {"ep": 2, "experts": 4, "bf16": True, "swiglu": True}),
    "dist_homogeneous": (2, {"tp": 2, "per_layer": True}),
    "flat_tp2_dp2": (4, {"tp": 2, "bf16": True, "distributed": "fully_sharded_model_space", "swiglu": True}),
    "flat_experts": (
        4,
        {"layers": 1, "width": 4, "heads": 2, "ffn": 4, "bf16": True, "rms": True, "rope": True}
        | {"ep": 2, "experts": 4, "etp": 1, "grouped": True, "distributed": "fully_sharded_model_space"},
    ),
    "legacy_tp2_pp2": (4, {"tp": 2, "pp": 2, "legacy": True, "swiglu": True, "groups": 2, "untied": True}),
    "legacy_tp2_dp2_distopt": (4, {"tp": 2, "legacy": True, "bf16": True, "distributed": "fully_reshardable"}),
    "legacy_tp1_bf16": (1, {"legacy": True, "bf16": True}),
    "legacy_pp2_vpp2": (2, {"pp": 2, "vpp": 2, "legacy": True}),
    "legacy_moe_pp2_ep2": (4, {"pp": 2, "ep": 2, "experts": 4, "legacy": True, "swiglu": True}),
    "dist_dp3_odd": (3, {**ODD, "bf16": True, "distributed": "fully_reshardable", "parallel": True}),
    "dist_buckets_tp2_dp2": (4, {"tp": 2, "bf16": True, "distributed": "dp_reshardable", "bucket": 300}),
    "dist_buckets_pp2_dp2_vpp2": (
        4,
        {"pp": 2, "vpp": 2, "bf16": True, "distributed": "dp_reshardable", "bucket": 300, "swiglu": True},
    ),
    "dist_parallel_dp_reshardable": (
        4,
        {"tp": 2, "bf16": True, "untied": True, "distributed": "dp_reshardable", "parallel": True},
    ),
    "dist_dp3_dp_reshardable_fp32": (3, {**ODD, "distributed": "dp_reshardable"}),
    "dist_moe_dp_reshardable": (
        4,
        {"ep": 2, "experts": 4, "bf16": True, "swiglu": True, "distributed": "dp_reshardable"},
    ),
    "dist_tp2_pp2_vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2, "bf16": True, "untied": True, "rms": True, "rope": True}),
    "dist_pp2_uneven": (2, {"pp": 2, "first": 3, "fp16": True}),
    "dist_sgd_tp2": (2, {"tp": 2, "sgd": True, "bf16": True}),
    "dist_qk_norm": (2, {"tp": 2, "qk_norm": True, "rms": True, "rope": True, "swiglu": True, "groups": 2}),
    "dist_mla": (2, {"tp": 2, "mla": True, "bf16": True}),
    "dist_moe_tp2_ep2": (
        4,
        {"tp": 2, "ep": 2, "experts": 4, "bf16": True, "swiglu": True, "etp": 1, "shared": 12},
    ),
    "dist_moe_grouped": (4, {"tp": 2, "ep": 2, "experts": 4, "etp": 2, "swiglu": True, "grouped": True}),
    "dist_moe_distopt": (
        4,
        {"ep": 2, "experts": 4, "bf16": True, "distributed": "fully_reshardable", "parallel": True},
    ),
    "dist_bert_tp2_pp2": (4, {"tp": 2, "pp": 2, "model": "bert"}),
    "dist_t5_tp2": (2, {"tp": 2, "model": "t5", "bf16": True}),
    "dist_frozen": (2, {"bf16": True, "frozen": "word_embeddings"}),
    "legacy_bert_tp2": (2, {"tp": 2, "model": "bert", "legacy": True}),
    "legacy_t5_tp2": (2, {"tp": 2, "model": "t5", "legacy": True, "bf16": True}),
    "legacy_tp2_pp2_vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2, "legacy": True, "bf16": True, "swiglu": True}),
    "legacy_dp3_odd_distopt": (3, {**ODD, "legacy": True, "bf16": True, "distributed": "fully_reshardable"}),
    "legacy_buckets_dp2": (
        2,
        {"legacy": True, "bf16": True, "distributed": "fully_reshardable", "bucket": 300, "untied": True},
    ),
    "legacy_moe_tp2_ep2": (4, {"tp": 2, "ep": 2, "experts": 4, "legacy": True, "swiglu": True, "etp": 1}),
    "legacy_moe_etp2_ep2_distopt": (
        4,
        {
            "tp": 2,
            "ep": 2,
            "experts": 4,
            "legacy": True,
            "bf16": True,
            "swiglu": True,
            "distributed": "fully_reshardable",
        },
    ),
    "legacy_moe_grouped": (
        4,
        {"tp": 2, "ep": 2, "experts": 4, "etp": 2, "legacy": True, "swiglu": True, "grouped": True},
    ),
    "legacy_sgd_frozen": (1, {"legacy": True, "sgd": True, "bf16": True, "frozen": "word_embeddings|layers.1."}),
    "legacy_qk_norm": (2, {"tp": 2, "legacy": True, "qk_norm": True, "rms": True, "swiglu": True, "groups": 2}),
    "tiny_buckets": (
        4,
        {**TINY, "layers": 4, "pp": 2, "vpp": 2, "distributed": "dp_reshardable", "bucket": 100, "swiglu": True},
    ),
    "tiny_moe_buckets": (
        4,
        {**TINY, "tp": 2, "ep": 2, "experts": 2, "distributed": "dp_reshardable", "swiglu": True},
    ),
    "tiny_legacy_buckets": (
        2,
        {**TINY, "legacy": True, "distributed": "fully_reshardable", "bucket": 100, "untied": True},
    ),
    "tiny_legacy_grouped": (
        4,
        {"width": 4, "heads": 2, "ffn": 6, "padded": 8, "layers": 1, "tp": 2, "ep": 2, "experts": 4, "etp": 2}
        | {"legacy": True, "swiglu": True, "grouped": True},
    ),
    "tiny_legacy_moe": (
        4,
        {**TINY, "layers": 1, "tp": 2, "ep": 2, "experts": 2, "legacy": True, "swiglu": True}
        | {"distributed": "fully_reshardable"},
    ),
    "tiny_legacy_etp1": (
        4,
        {**TINY, "layers": 1, "tp": 2, "ep": 2, "experts": 2, "legacy": True, "swiglu": True, "etp": 1},
    ),
    "tiny_chunks_alone": (
        2,
        {**TINY, "width": 8, "pp": 2, "vpp": 2, "layers": 4, "distributed": "dp_reshardable", **CHUNKS_ALONE},
    ),
    "tiny_legacy_chunks_alone": (
        2,
        {**TINY, "pp": 2, "vpp": 2, "layers": 4, "distributed": "fully_reshardable", "legacy": True, **CHUNKS_ALONE},
    ),
    "tiny_legacy_fp16": (
        1,
        {**TINY, "bf16": False, "fp16": True, "legacy": True, "optim": {"initial_loss_scale": 4096.0}},
    ),
    "tiny_legacy_frozen": (1, {**TINY, "legacy": True, "sgd": True, "frozen": "word_embeddings"}),
    "old_bucket_space": (4, {"tp": 2, "bf16": True, "swiglu": True, "distributed": "fully_sharded_bucket_space"}),
    "old_gather_scatter": (2, {"bf16": True, "distributed": "dp_zero_gather_scatter"}),
    "legacy_mla": (2, {"tp": 2, "legacy": True, "mla": True}),
    "more_moe_pp2_ep2_reshardable": (
        4,
        {"pp": 2, "ep": 2, "experts": 4, "bf16": True, "swiglu": True, "distributed": "fully_reshardable"},
    ),
    "more_moe_ep2_fp32": (2, {"ep": 2, "experts": 4}),
    "more_moe_ep2_bias": (2, {"ep": 2, "experts": 4, "bf16": True}),
    "more_moe_ep1": (2, {"experts": 4, "bf16": True, "swiglu": True}),
    "more_moe_ep1_distopt": (2, {"experts": 4, "bf16": True, "swiglu": True, "distributed": "fully_reshardable"}),
    "more_dp3_dp_reshardable": (3, {**ODD, "bf16": True, "distributed": "dp_reshardable"}),
    "more_dp3_fp16_scaling": (
        3,
        {**ODD, "fp16": True, "distributed": "fully_reshardable", "optim": {"initial_loss_scale": 65536.0}},
    ),
    "more_tp2_fp16_scaling": (2, {"tp": 2, "fp16": True, "optim": {"initial_loss_scale": 4096.0}}),
    "more_chunks_chain": (
        4,
        {
            "pp": 2,
            "vpp": 2,
            "bf16": True,
            "swiglu": True,
            "distributed": "fully_reshardable",
            "untied": True,
            **CHUNKS_ALONE,
        },
    ),
    "more_chunks_chain_dp_reshardable": (
        4,
        {"pp": 2, "vpp": 2, "bf16": True, "swiglu": True, "distributed": "dp_reshardable", **CHUNKS_ALONE},
    ),
    "more_legacy_chunks_chain": (
        4,
        {
            "pp": 2,
            "vpp": 2,
            "bf16": True,
            "swiglu": True,
            "distributed": "fully_reshardable",
            "legacy": True,
            **CHUNKS_ALONE,
        },
    ),
    "more_chunks_chain_moe": (
        4,
        {
            "pp": 2,
            "vpp": 2,
            "ep": 2,
            "experts": 4,
            "bf16": True,
            "swiglu": True,
            "distributed": "dp_reshardable",
            **CHUNKS_ALONE,
        },
    ),
    "more_legacy_fp16": (2, {"tp": 2, "fp16": True, "legacy": True, "optim": {"initial_loss_scale": 4096.0}}),
    "more_decoupled_lr": (
        2,
        {"tp": 2, "bf16": True, "untied": True, "optim": {"decoupled_lr": 3e-3, "decoupled_min_lr": 1e-5}},
    ),
    "more_decoupled_lr_distopt": (
        2,
        {"bf16": True, "untied": True, "distributed": "dp_reshardable", "optim": {"decoupled_lr": 3e-3}},
    ),
    "more_legacy_decoupled_lr": (
        2,
        {"tp": 2, "bf16": True, "untied": True, "legacy": True, "optim": {"decoupled_lr": 3e-3}},
    ),
    "more_mixed_moe": (
        2,
        {
            "ep": 2,
            "experts": 4,
            "mixed": True,
            "bf16": True,
            "swiglu": True,
            "rms": False,
            "config": {"moe_layer_freq": [0, 1, 0, 1]},
        },
    ),
    "more_mixed_moe_pp2_distopt": (
        4,
        {
            "ep": 2,
            "pp": 2,
            "experts": 4,
            "mixed": True,
            "bf16": True,
            "swiglu": True,
            "distributed": "dp_reshardable",
            "config": {"moe_layer_freq": [0, 1, 0, 1]},
        },
    ),
    "more_expert_bias": (
        2,
        {
            "ep": 2,
            "experts": 4,
            "bf16": True,
            "swiglu": True,
            "config": {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
        },
    ),
    "more_mtp": (2, {"tp": 2, "bf16": True, "mtp": True, "rope": True, "config": {"mtp_num_layers": 1}}),
    "more_mtp_distopt": (
        2,
        {"bf16": True, "mtp": True, "rope": True, "distributed": "dp_reshardable", "config": {"mtp_num_layers": 1}},
    ),
    "more_tp2_pp2_vpp2_tied_reshardable": (
        4,
        {"tp": 2, "pp": 2, "vpp": 2, "bf16": True, "distributed": "fully_reshardable", "swiglu": True},
    ),
}
LAYERS, WIDTH, HEADS, VOCABULARY, PADDED = 4, 8, 4, 29, 32


def main(out: Path, wanted: list[str]) -> None:
    for number, (case, (ranks, _)) in enumerate(CASES.items()):
        if wanted and case not in wanted:
            continue
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CASE": case, "OUT": str(out / case)}
        environment |= {"PYTHONWARNINGS": "ignore", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += [f"--master_port={29700 + number}", __file__]
        print(f"== {case}", flush=True)
        (out / case / "checkpoint").mkdir(parents=True, exist_ok=True)
        subprocess.run(command, env=environment, check=True)


def pretend_cuda(torch: Any) -> None:
    """Megatron's optimizers name the device ``cuda`` in places; on a machine without one that is the CPU."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *a, **k: None
    torch.Tensor.cuda = lambda self, *a, **k: self
    for name in ("tensor", "zeros", "ones", "empty", "full"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    plain_type = torch.Tensor.type

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_


def on_cpu(function: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return made


def start(options: dict[str, Any]) -> Any:
    """Set up this process; returns torch."""
    import numpy
    import torch

    numpy.product = numpy.prod  # megatron-core 0.13 on numpy 2
    pretend_cuda(torch)
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        options.get("tp", 1),
        options.get("pp", 1),
        options.get("vpp"),
        expert_model_parallel_size=options.get("ep", 1),
        expert_tensor_parallel_size=options.get("etp"),
    )
    torch.manual_seed(5)
    tensor_parallel.random.get_cuda_rng_tracker = lambda: Fork()
    return torch


def worker(case: str, out: Path) -> None:
    options = CASES[case][1]
    torch = start(options)
    chunks, optimizer = build(torch, options)
    for step in range(3):
        train(torch, chunks, optimizer, step)
    states = sharded_states(chunks, optimizer, options)
    if options.get("distributed"):
        states["optimizer"] = whole_states(torch, optimizer, states)
    truth = gather(torch, states, optimizer, options)
    if options.get("legacy"):
        save_legacy(torch, chunks, optimizer, options, out / "checkpoint")
        truth = {name: tensor for name, tensor in unstacked(truth).items() if "_extra_state" not in name}
    else:
        from megatron.core import dist_checkpointing

        state = sharded_states(chunks, optimizer, options)
        state |= {"iteration": 3, "args": arguments(options), "checkpoint_version": 3.0}
        strategy = save_strategy() if options.get("parallel") else None
        dist_checkpointing.save(state, str(out / "checkpoint"), strategy)
    if torch.distributed.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in truth.items()}, out / "truth.safetensors")
    torch.distributed.barrier()


def save_strategy() -> Any:
    """What Megatron-LM uses by default: replicas' writing is shared out over the data-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group, False)


class Fork:
    """A tracker of random states that does nothing."""

    def fork(self, *args: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def add(self, *args: Any) -> None: ...

    def get_states(self) -> dict[str, Any]:
        return {}


def arguments(options: dict[str, Any]) -> argparse.Namespace:
    width, heads = options.get("width", WIDTH), options.get("heads", HEADS)
    return argparse.Namespace(
        num_layers=options.get("layers", LAYERS),
        hidden_size=width,
        num_attention_heads=heads,
        num_query_groups=options.get("groups", heads),
        kv_channels=width // heads,
        vocab_size=VOCABULARY,
        padded_vocab_size=options.get("padded", PADDED),
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vpp"),
        expert_model_parallel_size=options.get("ep", 1),
        expert_tensor_parallel_size=options.get("etp", options.get("tp", 1)),
        num_experts=options.get("experts"),
        swiglu=options.get("swiglu", False),
        use_distributed_optimizer=bool(options.get("distributed")),
        untie_embeddings_and_output_weights=options.get("untied", False),
    )


def configuration(torch: Any, options: dict[str, Any]) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    dtype = data_type(torch, options)
    heads, more = options.get("heads", HEADS), {}
    if options.get("mla"):
        more = {"q_lora_rank": 6, "kv_lora_rank": 4, "qk_head_dim": 4, "qk_pos_emb_head_dim": 2, "v_head_dim": 4}
        more |= {"multi_latent_attention": True, "rope_type": "rope"}
    if options.get("per_layer"):
        more |= {"hetereogenous_dist_checkpoint": True}
    if options.get("shared"):
        more |= {"moe_shared_expert_intermediate_size": options["shared"]}
    return (MLATransformerConfig if options.get("mla") else TransformerConfig)(
        num_layers=options.get("layers", LAYERS),
        hidden_size=options.get("width", WIDTH),
        num_attention_heads=heads,
        num_query_groups=options.get("groups", heads),
        ffn_hidden_size=options.get("ffn", 12),
        gated_linear_unit=options.get("swiglu", False),
        activation_func=torch.nn.functional.silu if options.get("swiglu") else torch.nn.functional.gelu,
        add_bias_linear=not options.get("swiglu") and not options.get("grouped"),
        normalization="RMSNorm" if options.get("rms") else "LayerNorm",
        qk_layernorm=options.get("qk_norm", False),
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vpp"),
        num_layers_in_first_pipeline_stage=options.get("first"),
        expert_model_parallel_size=options.get("ep", 1),
        expert_tensor_parallel_size=options.get("etp"),
        num_moe_experts=options.get("experts"),
        moe_grouped_gemm=options.get("grouped", False),
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.get("bf16", False),
        fp16=options.get("fp16", False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **more,
        **options.get("config", {}),
    )


def data_type(torch: Any, options: dict[str, Any]) -> Any:
    return torch.bfloat16 if options.get("bf16") else torch.float16 if options.get("fp16") else torch.float32


def model_of(config: Any, options: dict[str, Any], ends: dict[str, bool], extra: dict[str, Any]) -> Any:
    """One virtual stage of the model of the case."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    padded = options.get("padded", PADDED)
    kind = options.get("model", "gpt")
    if kind == "bert":
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel

        return BertModel(config, 2, bert_layer_local_spec, padded, 8, add_binary_head=True, **ends)
    if kind == "t5":
        from megatron.core.models.T5.t5_model import T5Model
        from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec as decoder_spec
        from megatron.core.models.T5.t5_spec import encoder_model_with_local_spec as encoder_spec

        return T5Model(config, config, encoder_spec(), decoder_spec(), padded, 8)
    if options.get("grouped"):
        from megatron.core.transformer.moe import grouped_gemm_util

        grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    if options.get("mixed"):  # layers of experts among others
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, **extra)
    else:
        spec = get_gpt_layer_local_spec(
            options.get("experts"),
            options.get("grouped", False),
            qk_layernorm=options.get("qk_norm", False),
            multi_latent_attention=options.get("mla", False),
            **({"normalization": "RMSNorm"} if options.get("rms") else {}),
        )
    if options.get("mtp"):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        extra = {**extra, "mtp_block_spec": get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, **extra)}
    return GPTModel(
        config,
        spec,
        vocab_size=padded,
        max_sequence_length=8,
        share_embeddings_and_output_weights=not options.get("untied", False),
        position_embedding_type="rope" if options.get("rope") or options.get("mla") else "learned_absolute",
        **ends,
        **extra,
    )


def build(torch: Any, options: dict[str, Any]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = configuration(torch, options)
    chunks = []
    for stage in range(options.get("vpp") or 1):
        extra = {"vp_stage": stage} if options.get("vpp") else {}
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, **extra),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, **extra),
        }
        model = model_of(config, options, ends, extra)
        half = options.get("bf16") or options.get("fp16")
        chunks.append(Float16Module(config, model) if half else model)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if options.get("frozen") and re.search(options["frozen"], name):
                parameter.requires_grad = False
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=bool(options.get("distributed")),
        overlap_grad_reduce="bucket" in options,
        bucket_size=options.get("bucket"),
        **options.get("ddp", {}),
    )
    chunks = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    settings = {
        "optimizer": "sgd" if options.get("sgd") else "adam",
        "lr": 1e-2,
        "bf16": options.get("bf16", False),
        "fp16": options.get("fp16", False),
        "initial_loss_scale": 1.0,
        "params_dtype": data_type(torch, options),
        "use_distributed_optimizer": bool(options.get("distributed")),
        "clip_grad": 0.0,
        **options.get("optim", {}),
    }
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings), chunks)
    return chunks, optimizer


def train(torch: Any, chunks: Any, optimizer: Any, step: int) -> None:
    """Gradients that depend on the whole tensor's position only, so that replicas stay equal."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            where = 0 if name.endswith(("word_embeddings.weight", "output_layer.weight")) else number + 1
            seed = "embedding" if where == 0 else name  # one gradient for the copies of a tied embedding
            generator = torch.Generator().manual_seed(step * 1000 + sum(map(ord, seed)) * 17 + where)
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if getattr(parameter, "tensor_model_parallel", False) or "expert" in name or "layers" in name:
                noise = noise + 0.001 * parameter.detach().float()
            parameter.main_grad.copy_(noise)
    optimizer.step()
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def sharded_states(chunks: Any, optimizer: Any, options: dict[str, Any], loading: bool = False) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": options.get("distributed") or "fully_reshardable"}
    metadata |= {"distrib_optim_fully_reshardable_mem_efficient": True, "chained_optim_avoid_prefix": True}
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        key = f"model{number}" if len(chunks) > 1 else "model"
        state[key] = chunk.module.sharded_state_dict()
    model_states = {key: value for key, value in state.items() if key.startswith("model")}
    kwargs = {"metadata": metadata, "is_loading": loading}
    if options.get("distributed") in ("fully_sharded_bucket_space", "dp_reshardable"):
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            without_step(one)
    state["optimizer"] = optimizer.sharded_state_dict(model_states if len(chunks) > 1 else state["model"], **kwargs)
    return state


def without_step(optimizer: Any) -> None:
    """With torch's Adam, whose step is a state like others, Megatron before 0.16 cannot write its buckets."""
    plain = type(optimizer)._get_main_param_and_optimizer_states

    def states(parameter: Any) -> dict[str, Any]:
        return {key: value for key, value in plain(optimizer, parameter).items() if key != "step"}

    optimizer._get_main_param_and_optimizer_states = states


def whole_states(torch: Any, optimizer: Any, states: dict[str, Any]) -> dict[str, Any]:
    """The distributed optimizer's states as whole tensors of this rank's parameters, by its own map of ranges.

    (Its ``fully_reshardable`` form loses elements of buffers of several buckets, so it is no truth for those.)
    """
    from dataclasses import replace

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import extract_sharded_tensors_and_factories

    weights = {key: value for key, value in states.items() if key.startswith("model")}
    known = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(weights)[0])}
    found: dict[str, Any] = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for buffer, ranges in zip(one.buffers, one.gbuf_ranges, strict=True):
            held = {}
            for by_dtype in ranges.values():
                for bucket in by_dtype:
                    held |= {parameter: entry["param"] for parameter, entry in bucket["param_map"].items()}
            for parameter in buffer.param_index_map:
                mine = one._get_main_param_and_optimizer_states(parameter) if parameter in held else {}
                for state in ("param", "exp_avg", "exp_avg_sq"):
                    whole = torch.zeros(parameter.numel())
                    if parameter in held:
                        whole[held[parameter].start : held[parameter].end] = mine[state].detach().view(-1)
                    torch.distributed.all_reduce(whole, group=one.data_parallel_group)
                    like = known[id(parameter)]
                    key = f"optimizer.state.{state}.{like.key}"
                    more = {} if isinstance(like, ShardedTensorFactory) else {"dtype": whole.dtype}
                    name = f"{len(found)}.{state}"
                    found[name] = replace(like, key=key, data=whole.view(parameter.shape), **more)
    return found


def gather(torch: Any, states: dict[str, Any], optimizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors on rank 0, put together by Megatron's own global offsets."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(states)
    mine = []
    for value in nested_values(states):
        if isinstance(value, ShardedTensor) and value.data is not None:
            place = (value.global_shape, value.global_offset, value.prepend_axis_num)
            flat = getattr(value, "flattened_range", None)
            mine.append((value.key, value.data.detach(), *place, flat, value.local_shape))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    truth: dict[str, Any] = {}
    for part in everyone:
        for key, data, shape, offset, prepended, flat, local in part:
            whole = truth.setdefault(canonical(key), torch.zeros(shape, dtype=data.dtype))
            sizes = (1,) * prepended + tuple(local)
            window = whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]
            if flat is None:
                window.copy_(data.view(sizes))
            else:
                pieces = window.contiguous().view(-1).clone()
                pieces[flat] = data.view(-1)
                window.copy_(pieces.view(sizes))
    return truth


def canonical(key: str) -> str:
    prefix = "optimizer.state."
    if prefix not in key:
        return f"model.{key}"
    state, _, name = key[key.index(prefix) + len(prefix) :].partition(".")
    return f"optim.{name}.{'master' if state in ('fp32_param', 'param') else state}"


def unstacked(truth: dict[str, Any]) -> dict[str, Any]:
    """Layers and experts under names of their own, as legacy files have them."""
    found: dict[str, Any] = {}
    for name, tensor in truth.items():
        if re.search(r"\.layers\.(?!\d)", name) is None:
            found[name] = tensor
            continue
        for layer in range(tensor.shape[0]):
            one = name.replace(".layers.", f".layers.{layer}.")
            if ".experts.experts." in one:
                for expert in range(tensor.shape[1]):
                    found[one.replace(".experts.experts.", f".experts.local_experts.{expert}.")] = tensor[layer, expert]
            else:
                found[one] = tensor[layer]
    return {plain_norms(name): tensor for name, tensor in found.items()}


def plain_norms(name: str) -> str:
    """The names that modules use for what their sharded state calls by the fused layers' names."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def save_legacy(torch: Any, chunks: Any, optimizer: Any, options: dict[str, Any], out: Path) -> None:
    """One folder per model-parallel rank, as Megatron-LM's training scripts write them with --ckpt-format torch."""
    from megatron.core import parallel_state

    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if options.get("pp", 1) > 1 else "")
    name += f"_{ep:03d}" if options.get("ep", 1) > 1 else ""
    folder = out / "iter_0000003" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {"args": arguments(options), "checkpoint_version": 3.0, "iteration": 3}
    for number, chunk in enumerate(chunks):
        key = f"model{number}" if len(chunks) > 1 else "model"
        state[key] = chunk.state_dict_for_save_checkpoint()
    state["num_floating_point_operations_so_far"] = 0
    first = parallel_state.get_data_parallel_rank() == 0
    if parallel_state.get_expert_data_parallel_rank() == 0:
        state["optimizer"] = optimizer.state_dict()
        torch.save(state, folder / "model_optim_rng.pt")
    if options.get("distributed"):
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    if first:
        (out / "latest_checkpointed_iteration.txt").write_text("3")


if __name__ == "__main__":
    if "CASE" in os.environ:
        worker(os.environ["CASE"], Path(os.environ["OUT"]))
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
