"""Write small checkpoints with Megatron-core itself, and beside each the truth that its own sharding metadata gives.

Needs megatron-core (CPU is enough).  ``python tests/sources/make_megatron.py OUT [CASE ...]`` starts one torchrun per
case and writes ``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.safetensors`` (canonical name -> tensor).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "legacy_tp2_pp2": (4, {"tp": 2, "pp": 2, "legacy": True, "swiglu": True, "groups": 2, "untied": True}),
    "legacy_tp2_dp2_distopt": (4, {"tp": 2, "legacy": True, "bf16": True, "distributed": "fully_reshardable"}),
    "legacy_tp1_bf16": (1, {"legacy": True, "bf16": True}),
    "legacy_pp2_vpp2": (2, {"pp": 2, "vpp": 2, "legacy": True}),
    "legacy_moe_pp2_ep2": (4, {"pp": 2, "ep": 2, "experts": 4, "legacy": True, "swiglu": True}),
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
    truth = gather(torch, states, optimizer, options)
    if options.get("legacy"):
        save_legacy(torch, chunks, optimizer, options, out / "checkpoint")
        truth = {name: tensor for name, tensor in unstacked(truth).items() if "_extra_state" not in name}
    else:
        from megatron.core import dist_checkpointing

        state = sharded_states(chunks, optimizer, options)
        state |= {"iteration": 3, "args": arguments(options), "checkpoint_version": 3.0}
        dist_checkpointing.save(state, str(out / "checkpoint"))
    if torch.distributed.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in truth.items()}, out / "truth.safetensors")
    torch.distributed.barrier()


class Fork:
    """A tracker of random states that does nothing."""

    def fork(self, *args: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def add(self, *args: Any) -> None: ...

    def get_states(self) -> dict[str, Any]:
        return {}


def arguments(options: dict[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=options.get("groups", HEADS),
        kv_channels=WIDTH // HEADS,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED,
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vpp"),
        expert_model_parallel_size=options.get("ep", 1),
        num_experts=options.get("experts"),
        swiglu=options.get("swiglu", False),
        use_distributed_optimizer=bool(options.get("distributed")),
        untie_embeddings_and_output_weights=options.get("untied", False),
    )


def build(torch: Any, options: dict[str, Any]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=options.get("groups", HEADS),
        ffn_hidden_size=12,
        gated_linear_unit=options.get("swiglu", False),
        activation_func=torch.nn.functional.silu if options.get("swiglu") else torch.nn.functional.gelu,
        add_bias_linear=not options.get("swiglu") and not options.get("grouped"),
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vpp"),
        expert_model_parallel_size=options.get("ep", 1),
        num_moe_experts=options.get("experts"),
        moe_grouped_gemm=options.get("grouped", False),
        sequence_parallel=bool(options.get("experts")) and options.get("tp", 1) > 1,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.get("bf16", False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        hetereogenous_dist_checkpoint=options.get("per_layer", False),
    )
    chunks = []
    stages = options.get("vpp") or 1
    for stage in range(stages):
        spec = get_gpt_layer_local_spec(options.get("experts"), options.get("grouped", False))
        extra = {"vp_stage": stage} if options.get("vpp") else {}
        model = GPTModel(
            config,
            spec,
            vocab_size=PADDED,
            max_sequence_length=8,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **extra),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **extra),
            share_embeddings_and_output_weights=not options.get("untied", False),
            **extra,
        )
        chunks.append(Float16Module(config, model) if options.get("bf16") else model)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=bool(options.get("distributed")))
    chunks = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=options.get("bf16", False),
            params_dtype=dtype,
            use_distributed_optimizer=bool(options.get("distributed")),
            clip_grad=0.0,
        ),
        chunks,
    )
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
            noise = torch.randn(parameter.shape, generator=generator)
            if getattr(parameter, "tensor_model_parallel", False) or "expert" in name or "layers" in name:
                noise = noise + 0.001 * parameter.detach().float()
            parameter.main_grad.copy_(noise)
    optimizer.step()


def sharded_states(chunks: Any, optimizer: Any, options: dict[str, Any], loading: bool = False) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": options.get("distributed") or "fully_reshardable"}
    metadata |= {"distrib_optim_fully_reshardable_mem_efficient": True, "chained_optim_avoid_prefix": True}
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        key = f"model{number}" if len(chunks) > 1 else "model"
        state[key] = chunk.module.sharded_state_dict()
    model_states = {key: value for key, value in state.items() if key.startswith("model")}
    kwargs = {"metadata": metadata, "is_loading": loading}
    state["optimizer"] = optimizer.sharded_state_dict(model_states if len(chunks) > 1 else state["model"], **kwargs)
    return state


def gather(torch: Any, states: dict[str, Any], optimizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors on rank 0, put together by Megatron's own global offsets."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(states)
    mine = []
    for value in nested_values(states):
        if isinstance(value, ShardedTensor) and value.data is not None and ".distributed." not in value.key:
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
        if ".decoder.layers." not in name or name.split(".decoder.layers.")[1][0].isdigit():
            found[name] = tensor
            continue
        for layer in range(tensor.shape[0]):
            one = name.replace(".decoder.layers.", f".decoder.layers.{layer}.")
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
