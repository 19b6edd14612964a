"""Write many small checkpoints with DeepSpeed under odd settings, and beside each the truth from its buffers in memory.

Needs deepspeed (CPU is enough).  ``python tests/sources/make_deepspeed_zoo.py OUT [CASE ...]`` forks the ranks of one
case after another and writes ``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.safetensors`` (canonical name -> tensor).
The truth is put together from the flat buffers, beside the code that DeepSpeed saves and loads with, and every master
copy is compared with the weight that DeepSpeed made of it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"width": 11, "inner": 17, "vocabulary": 37}

# case -> (ranks, options)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16opt_dp3": (3, {"stage": 1, "accumulate": "fp32"}),
    "bf16opt_dp2_frozen_tied": (2, {"stage": 1, "accumulate": "fp32", "frozen": True, "tied": True}),
    "bf16opt_dp4_oddities": (4, {"stage": 1, "accumulate": "fp32", "odd": True}),
    "zero2_dp4_accumulate_fp32": (4, {"stage": 2, "accumulate": "fp32", "odd": True}),
    "zero1_dp4_oddities_fp16": (4, {"stage": 1, "dtype": "fp16", "odd": True}),
    "zero3_dp4_oddities": (4, {"stage": 3, "odd": True}),
    "zero3_dp3_fp32_oddities": (3, {"stage": 3, "dtype": "fp32", "odd": True, "tied": True}),
    "zero3_dp1": (1, {"stage": 3}),
    "zero3_dp2_persistent": (2, {"stage": 3, "zero": {"stage3_param_persistence_threshold": 100000}}),
    "zero3_dp4_subgroups_odd": (4, {"stage": 3, "odd": True, "zero": {"sub_group_size": 60}, "frozen": True}),
    "zero3_dp4_hpz": (4, {"stage": 3, "zero": {"zero_hpz_partition_size": 2}}),
    "zero3_dp2_excluded": (2, {"stage": 3, "frozen": True, "save": {"exclude_frozen_parameters": True}}),
    "zero2_dp2_excluded": (2, {"stage": 2, "frozen": True, "save": {"exclude_frozen_parameters": True}}),
    "zero1_dp2_frozen": (2, {"stage": 1, "frozen": True}),
    "zero1_dp3_onegroup": (3, {"stage": 1, "groups": "one"}),
    "zero2_dp2_manygroups": (2, {"stage": 2, "groups": "each"}),
    "zero3_dp2_manygroups": (2, {"stage": 3, "groups": "each"}),
    "zero1_dp2_reversed": (2, {"stage": 1, "groups": "reversed"}),
    "zero3_dp2_reversed": (2, {"stage": 3, "groups": "reversed"}),
    "zero1_dp2_sgd_plain": (2, {"stage": 1, "optimizer": "sgd0"}),
    "zero3_dp2_sgd_plain": (2, {"stage": 3, "optimizer": "sgd0"}),
    "zero1_dp3_adagrad": (3, {"stage": 1, "optimizer": "adagrad", "groups": "one"}),
    "zero3_dp3_adagrad": (3, {"stage": 3, "optimizer": "adagrad", "groups": "one"}),
    "zero2_dp2_lion": (2, {"stage": 2, "optimizer": "lion"}),
    "zero3_dp2_lion": (2, {"stage": 3, "optimizer": "lion"}),
    "zero2_dp3_amsgrad": (3, {"stage": 2, "optimizer": "amsgrad", "dtype": "fp32"}),
    "zero2_dp3_nadam": (3, {"stage": 2, "optimizer": "nadam"}),
    "zero3_dp3_nadam": (3, {"stage": 3, "optimizer": "nadam"}),
    "zero1_dp2_adafactor": (2, {"stage": 1, "optimizer": "adafactor"}),
    "zero3_dp2_adamax": (2, {"stage": 3, "optimizer": "adamax"}),
    "zero2_dp3_rmsprop_centered": (3, {"stage": 2, "optimizer": "rmsprop"}),
    "zero1_dp2_asgd": (2, {"stage": 1, "optimizer": "asgd"}),
    "zero2_dp2_groupstep": (2, {"stage": 2, "optimizer": "groupstep"}),
    "zero3_dp2_groupstep": (2, {"stage": 3, "optimizer": "groupstep"}),
    "zero2_dp4_elastic_sgd": (4, {"stage": 2, "optimizer": "sgd", "odd": True, "zero": {"elastic_checkpoint": True}}),
    "zero1_dp2_elastic_groupstep": (
        2, {"stage": 1, "optimizer": "groupstep", "zero": {"elastic_checkpoint": True}}),
    "zero1_dp4_aligned_odd": (4, {"stage": 1, "odd": True, "zero": {"parameter_alignment": True}}),
    "zero2_dp3_aligned_roundrobin": (
        3, {"stage": 2, "odd": True, "zero": {"parameter_alignment": True, "round_robin_gradients": True}}),
    "zero2_dp4_roundrobin_odd": (4, {"stage": 2, "odd": True, "zero": {"round_robin_gradients": True}}),
    "zero2_dp2_states_bf16": (
        2, {"stage": 2, "config": {"bf16": {
            "enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}}),
    "zero3_dp2_states_bf16": (
        2, {"stage": 3, "config": {"bf16": {
            "enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}}),
    "zero2_dp2_offload": (2, {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    "zero3_dp2_offload": (
        2, {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}),
    "zero1_dp2_autocast": (2, {"stage": 1, "dtype": "fp32", "config": {"torch_autocast": {"enabled": True}}}),
    "stage0_dp2_bf16_fused": (2, {"stage": 0, "fused": True, "tied": True, "frozen": True}),
    "stage0_dp1_fp16_fused_reversed": (1, {"stage": 0, "dtype": "fp16", "fused": True, "groups": "reversed"}),
    "stage0_dp2_bf16": (2, {"stage": 0, "odd": True, "tied": True}),
    "stage0_dp2_fp16": (2, {"stage": 0, "dtype": "fp16", "frozen": True}),
    "stage0_dp2_fp32_frozen": (2, {"stage": 0, "dtype": "fp32", "frozen": True, "tied": True}),
    "stage0_dp1_fp32_onegroup": (1, {"stage": 0, "dtype": "fp32", "groups": "one", "odd": True}),
    "stage0_dp2_fp32_reversed": (2, {"stage": 0, "dtype": "fp32", "groups": "reversed"}),
    "stage0_dp2_bf16_each": (2, {"stage": 0, "groups": "each"}),
    "stage0_dp2_fp32_sgd0": (2, {"stage": 0, "dtype": "fp32", "optimizer": "sgd0"}),
    "scheduler_and_skips": (2, {"stage": 2, "dtype": "fp16", "scheduler": True, "config": {
        "fp16": {"enabled": True, "initial_scale_power": 40, "loss_scale_window": 2, "hysteresis": 1}}, "steps": 30}),
    "static_scale": (2, {"stage": 1, "dtype": "fp16", "config": {"fp16": {"enabled": True, "loss_scale": 8}}}),
    "tagged": (2, {"stage": 1, "save": {"tag": "best-model"}}),
    "ulysses_sp2": (4, {"stage": 3, "config": {"sequence_parallel_size": 2}}),
    "moe_ep2_dp4_stage0": (4, {"stage": 0, "moe": 2}),
    "moe_ep2_dp2_stage0_fp32": (2, {"stage": 0, "moe": 2, "dtype": "fp32"}),
    "moe_ep2_dp4_bf16opt": (4, {"stage": 1, "moe": 2, "accumulate": "fp32"}),
    "moe_ep2_dp4_data_first": (
        4, {"stage": 1, "moe": 2, "config": {"use_data_before_expert_parallelism": True}}),
    "moe_ep1_dp2_zero1": (2, {"stage": 1, "moe": 1}),
    "moe_ep4_dp4_zero2": (4, {"stage": 2, "moe": 4, "dtype": "fp16"}),
    "moe_ep2_dp4_residual": (4, {"stage": 2, "moe": 2, "residual": True, "frozen": True}),
    "pipeline_pp2_dp2_bf16opt_tied": (4, {"stage": 1, "pipeline": 2, "tied": True, "accumulate": "fp32"}),
    "pipeline_pp2_dp2_bf16_stage0": (4, {"stage": 0, "pipeline": 2}),
    "pipeline_pp2_dp2_fp32_frozen": (4, {"stage": 1, "pipeline": 2, "dtype": "fp32", "frozen": True, "tied": True}),
    "pipeline_pp2_dp1_fp32_stage0": (2, {"stage": 0, "pipeline": 2, "dtype": "fp32"}),
}  # fmt: skip


def main(out: Path, wanted: list[str]) -> int:
    preload()
    failed = []
    for number, case in enumerate(CASES):
        if wanted and case not in wanted:
            continue
        print(f"== {case}", flush=True)
        if not run(out, case, 29700 + number + os.getpid() % 97):
            failed.append(case)
    print("failed:", *failed)
    return bool(failed)


def preload() -> None:
    """Import once what every rank, which is a fork, would import by itself for seconds."""
    importlib.import_module("torch").set_num_threads(1)
    for module in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
        with contextlib.suppress(ImportError):  # older versions have no Muon
            importlib.import_module(module)


def run(out: Path, case: str, port: int) -> bool:
    """Write one case; True when all ranks end well."""
    return forked(CASES[case][0], port, lambda: worker(case, out / case))


def forked(ranks: int, port: int, work: Callable[[], None]) -> bool:
    """Do ``work`` on forked ranks; True when all of them end well."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    return not any(ended)


def resume(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    """Load a checkpoint with DeepSpeed, write what it loaded to ``out``, and train on."""
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=True)
    torch.manual_seed(99)
    engine = build(deepspeed, torch, options)
    path, client = engine.load_checkpoint(str(checkpoint))
    assert path is not None, "DeepSpeed found no checkpoint"
    assert client["note"] == "seven"
    loaded = gather(engine, torch, options)
    if torch.distributed.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in loaded.items()}, out)
    before = engine.global_steps
    train(engine, torch, options)
    assert engine.global_steps == before + options.get("steps", 3)
    for parameter in engine.module.parameters():
        assert torch.isfinite(parameter).all()


def worker(case: str, out: Path) -> None:
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=True)
    options = CASES[case][1]
    torch.manual_seed(7)
    engine = build(deepspeed, torch, options)
    train(engine, torch, options)
    engine.save_checkpoint(
        str(out / "checkpoint"), client_state={"note": "seven", "iteration": 3}, **options.get("save", {})
    )
    truth = gather(engine, torch, options)
    if torch.distributed.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in truth.items()}, out / "truth.safetensors")
    torch.distributed.barrier()


def build(deepspeed: Any, torch: Any, options: dict[str, Any]) -> Any:
    dtype = options.get("dtype", "bf16")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 if "pipeline" in options else 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": options["stage"], "stage3_param_persistence_threshold": 0, "overlap_comm": False,
            **options.get("zero", {})},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 4},
        "steps_per_print": 1000,
        "checkpoint": {"load_universal": bool(options.get("universal"))},
        **options.get("config", {}),
    }  # fmt: skip
    if options.get("accumulate"):
        config["data_types"] = {"grad_accum_dtype": options["accumulate"]}
    if dtype == "fp16":  # which DeepSpeed allows on the newest processors only, for their speed
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if options.get("scalar") or options.get("transposed"):  # which DeepSpeed cannot broadcast; ranks are equal anyway
        deepspeed.DeepSpeedEngine._broadcast_model = lambda self: None
    if options.get("fused"):  # DeepSpeed's own needs a GPU
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    model = pipeline(torch, options) if "pipeline" in options else model_of(torch, options)
    freeze(model, options)
    optimizer = optimizer_of(torch, model, options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if options.get("scheduler") else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=scheduler, model_parameters=trained
    )[0]


def freeze(model: Any, options: dict[str, Any]) -> None:
    if options.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not any(part in name for part in ("blocks.0.up", "position", "1.bias"))


def optimizer_of(torch: Any, model: Any, options: dict[str, Any]) -> Any:
    """The optimizer of a case over the model's trained parameters in the case's groups."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shape = {id(p): tuple(getattr(p, "ds_shape", p.shape)) for p in trained}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if len(shape[id(p)]) > 1], "weight_decay": 0.1, "name": "matrices"},
        {"params": [p for p in trained if len(shape[id(p)]) <= 1], "weight_decay": 0.0, "lr": 5e-3, "name": "vectors"},
    ]
    if "moe" in options:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        groups = list(split_params_into_different_moe_groups_for_optimizer(groups))
    if options.get("groups") == "one":
        groups = [{"params": trained}]
    elif options.get("groups") == "each":
        groups = [{"params": [p], "lr": 1e-2 / (n + 1)} for n, p in enumerate(trained)]
    elif options.get("groups") == "reversed":
        groups = [{"params": trained[::-2]}, {"params": trained[-2::-2], "weight_decay": 0.0}]
    optim = torch.optim
    made = {
        "adamw": lambda: optim.AdamW(groups, lr=1e-2),
        "sgd": lambda: optim.SGD(groups, lr=1e-2, momentum=0.9),
        "sgd0": lambda: optim.SGD(groups, lr=1e-2),
        "adagrad": lambda: optim.Adagrad(groups, lr=1e-2),
        "amsgrad": lambda: optim.AdamW(groups, lr=1e-2, amsgrad=True),
        "nadam": lambda: optim.NAdam(groups, lr=1e-2),
        "adafactor": lambda: optim.Adafactor(groups, lr=1e-2),
        "adamax": lambda: optim.Adamax(groups, lr=1e-2),
        "asgd": lambda: optim.ASGD(groups, lr=1e-2),
        "rmsprop": lambda: optim.RMSprop(groups, lr=1e-2, centered=True, momentum=0.8),
        "lion": lambda: _lion(torch)(groups, {"lr": 1e-2}),
        "groupstep": lambda: _group_step(torch)(groups, {"lr": 1e-2}),
    }
    return made[options.get("optimizer", "adamw")]()


def _lion(torch: Any) -> Any:
    class Lion(torch.optim.Optimizer):
        """One state, no counter."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                        p.add_(torch.sign(average * 0.9 + p.grad * 0.1), alpha=-group["lr"])
                        average.mul_(0.99).add_(p.grad, alpha=0.01)

    return Lion


def _group_step(torch: Any) -> Any:
    class GroupStep(torch.optim.Optimizer):
        """Counts in the group as fused optimizers do, and keeps two states."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        state.setdefault("exp_avg", torch.zeros_like(p)).mul_(0.9).add_(p.grad, alpha=0.1)
                        state.setdefault("exp_avg_sq", torch.zeros_like(p)).mul_(0.9).addcmul_(p.grad, p.grad)
                        p.sub_(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-3), alpha=group["lr"])

    return GroupStep


def model_of(torch: Any, options: dict[str, Any]) -> Any:
    nn = torch.nn
    width, inner, vocabulary = (options.get(key, size) for key, size in SIZES.items())
    tied, odd, experts = (options.get(key) for key in ("tied", "odd", "moe"))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            if experts:
                from deepspeed.moe.layer import MoE

                expert = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))
                residual = bool(options.get("residual"))
                self.moe = MoE(width, expert, num_experts=4, ep_size=experts, min_capacity=4, use_residual=residual)
            self.up = nn.Linear(width, inner)
            self.down = nn.Linear(inner, width)
            self.register_buffer("scale", torch.full((3,), 0.5))
            self.register_buffer("mask", torch.ones(2), persistent=False)

        def forward(self, x: Any) -> Any:
            if experts:
                x = x + self.moe(self.norm(x))[0]
            return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.scale[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.position = nn.Parameter(torch.randn(5, width) * 0.1)
            self.blocks = nn.ModuleList(Block() for _ in range(options.get("blocks", 2)))
            if options.get("shared"):
                self.blocks.append(self.blocks[0])
            if options.get("scalar"):
                self.scalar = nn.Parameter(torch.tensor(1.5))
            if options.get("transposed"):
                self.turned = nn.Parameter((torch.randn(width, 3) * 0.1).t())
            if options.get("empty"):
                self.empty = nn.Parameter(torch.empty(0, 3))
            if odd:
                self.gain = nn.Parameter(torch.ones(1, 1, 1))
                self.one = nn.Parameter(torch.ones(1))
                self.cube = nn.Parameter(torch.randn(1, 3, 1, 2))
                self.unused = nn.Parameter(torch.randn(3, 2))
            self.head = nn.Linear(width, vocabulary, bias=False)
            if tied:
                self.head.weight = self.embed.weight
            self.register_buffer("seen", torch.arange(4))

        def forward(self, tokens: Any, labels: Any) -> Any:
            x = self.embed(tokens) + self.position
            for block in self.blocks:
                x = block(x)
            if odd:
                x = x * self.gain + self.one * self.cube.sum()
            if options.get("scalar"):
                x = x * self.scalar
            if options.get("transposed"):
                x = x + self.turned[1]
            return nn.functional.cross_entropy(self.head(x).float().view(-1, vocabulary), labels.view(-1))

    return Model()


def pipeline(torch: Any, options: dict[str, Any]) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    nn = torch.nn
    width, _, vocabulary = (options.get(key, size) for key, size in SIZES.items())

    class Head(nn.Embedding):
        def forward(self, x: Any) -> Any:
            return x @ self.weight.t()

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)
            self.register_buffer("factor", torch.full((2,), 0.5))

        def forward(self, x: Any) -> Any:
            return x + self.linear(x) * self.factor[0]

    def loss(logits: Any, labels: Any) -> Any:
        return nn.functional.cross_entropy(logits.float().view(-1, vocabulary), labels.view(-1))

    first, last = LayerSpec(nn.Embedding, vocabulary, width), LayerSpec(Head, vocabulary, width)
    if options.get("tied"):
        first = TiedLayerSpec("embed", nn.Embedding, vocabulary, width)
        last = TiedLayerSpec("embed", nn.Embedding, vocabulary, width, forward_fn=lambda m, x: x @ m.weight.t())
    middle = [LayerSpec(nn.Linear, width, width), LayerSpec(Residual), nn.functional.gelu]
    middle.append(LayerSpec(nn.LayerNorm, width))
    return PipelineModule(
        [first, *middle, LayerSpec(Residual), last], num_stages=options["pipeline"], loss_fn=loss,
        partition_method="uniform")  # fmt: skip


def train(engine: Any, torch: Any, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())

    def batch() -> Any:
        data = torch.randint(0, options.get("vocabulary", SIZES["vocabulary"]), (1, 6), generator=generator)
        return data[:, :-1], data[:, 1:]

    for _ in range(options.get("steps", 3)):
        if "pipeline" in options:
            engine.train_batch(iter([batch(), batch()]))
        else:
            engine.backward(engine(*batch()))
            engine.step()


# the truth


def gather(engine: Any, torch: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Every tensor under its canonical name, from what is in memory."""
    inner = engine.optimizer
    if options["stage"] == 3:
        found = _sliced(engine, torch)
    elif hasattr(inner, "single_partition_of_fp32_groups"):
        found = _even(engine, torch, inner.single_partition_of_fp32_groups, inner.round_robin_bit16_groups,
                      getattr(inner, "round_robin_bit16_offsets", None))  # fmt: skip
    elif hasattr(inner, "fp32_groups_flat_partition"):
        found = _even(engine, torch, inner.fp32_groups_flat_partition, inner.bf16_groups, None)
    else:
        found = _unsharded(engine, torch)
    if options["stage"] == 3:
        found |= _weights3(engine, torch, found, options)
    else:
        kept = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
        dropped = kept if options.get("save", {}).get("exclude_frozen_parameters") else set()
        state = engine.module.state_dict()
        found |= {f"model.{name}": tensor.detach() for name, tensor in state.items() if name not in dropped}
    if "moe" in options:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        in_rows = "use_data_before_expert_parallelism" in options.get("config", {})
        expert_rank = rank // (ranks // options["moe"]) if in_rows else rank % options["moe"]
        first = expert_rank * (4 // options["moe"])
        found = {_global(name, first): tensor for name, tensor in found.items()}
    if "moe" not in options and "pipeline" not in options:
        return found
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    return {name: tensor for part in reversed(everyone) for name, tensor in part.items()}


def _global(name: str, first: int) -> str:
    """The name of a rank's expert under its global number."""
    head, marker, tail = name.partition("deepspeed_experts.")
    number, _, rest = tail.partition(".")
    return f"{head}{marker}{int(number) + first}.{rest}" if marker else name


def _even(engine: Any, torch: Any, flats: Any, groups: Any, offsets: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base = engine.optimizer.optimizer
    for g, flat in enumerate(flats):
        shared = engine.optimizer.real_dp_process_group[g]
        positions = offsets[g] if offsets else _positions([p.numel() for p in groups[g]])
        buffers = {"master": flat.detach()}
        scalars: dict[str, Any] = {}
        for key, value in [*base.state[flat].items(), *_counter(base, g)]:
            if torch.is_tensor(value) and value.numel() == flat.numel() and value.dim():
                buffers[key] = value.detach()
            elif value is not None:
                scalars[key] = _scalar(torch, value)
        for key, part in buffers.items():
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(shared))]
            torch.distributed.all_gather(parts, part.contiguous(), group=shared)
            whole = torch.cat(parts)
            for parameter, position in zip(groups[g], positions, strict=True):
                name = engine.param_names[parameter]
                value = whole[position : position + parameter.numel()].view(parameter.shape)
                found[f"optim.{name}.{key}"] = value
                if key == "master":
                    assert torch.equal(value.to(parameter.dtype), parameter), name
        for parameter in groups[g]:
            found |= {f"optim.{engine.param_names[parameter]}.{key}": value for key, value in scalars.items()}
    return found


def _positions(sizes: list[int]) -> list[int]:
    return [sum(sizes[:n]) for n in range(len(sizes))]


def _counter(base: Any, g: int) -> list[tuple[str, Any]]:
    step = base.param_groups[g].get("step")
    return [] if step is None else [("step", step)]


def _scalar(torch: Any, value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach().reshape(())
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)


def _sliced(engine: Any, torch: Any) -> dict[str, Any]:
    optimizer = engine.optimizer
    base, found = optimizer.optimizer, {}
    for g, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        parameters = optimizer.fp16_groups[g]
        shared = parameters[0].ds_process_group
        buffers, scalars = {"master": flat.detach()}, {}
        for key, value in [*base.state[flat].items(), *_counter(base, optimizer.sub_group_to_group_id[g])]:
            if torch.is_tensor(value) and value.numel() == flat.numel() and value.dim():
                buffers[key] = value.detach()
            elif value is not None:
                scalars[key] = _scalar(torch, value)
        for key, part in buffers.items():
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(shared))]
            torch.distributed.all_gather(parts, part.contiguous(), group=shared)
            position = 0
            for parameter in parameters:
                piece = parameter.partition_numel()
                whole = torch.cat([rank[position : position + piece] for rank in parts])
                position += piece
                name = engine.param_names[parameter]
                found[f"optim.{name}.{key}"] = whole[: parameter.ds_numel].view(parameter.ds_shape)
        for parameter in parameters:
            found |= {f"optim.{engine.param_names[parameter]}.{key}": value for key, value in scalars.items()}
    return found


def _weights3(engine: Any, torch: Any, states: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if parameter.requires_grad:
                master = states[f"optim.{engine.param_names[parameter]}.master"]
                assert torch.equal(master.to(parameter.dtype), parameter), name
                found[f"model.{name}"] = master
            elif not options.get("save", {}).get("exclude_frozen_parameters"):
                found[f"model.{name}"] = parameter.detach().clone()
    lasting = engine.module.state_dict().keys()
    buffers = engine.module.named_buffers(remove_duplicate=False)
    return found | {f"model.{name}": buffer.detach() for name, buffer in buffers if name in lasting}


def _unsharded(engine: Any, torch: Any) -> dict[str, Any]:
    """Masters and states without ZeRO."""
    inner, found = engine.optimizer, {}
    if hasattr(inner, "fp32_groups_flat"):
        return _whole_flats(engine, torch)
    if hasattr(inner, "fp32_groups"):
        base = inner.optimizer
        pairs = [
            pair
            for halves, masters in zip(inner.fp16_groups, inner.fp32_groups, strict=True)
            for pair in zip(halves, masters, strict=True)
        ]
    else:
        base = inner
        pairs = [(p, p) for group in inner.param_groups for p in group["params"]]
    counters = {id(p): group.get("step") for group in base.param_groups for p in group["params"]}
    for parameter, master in pairs:
        name = engine.param_names[parameter]
        if master is not parameter:
            found[f"optim.{name}.master"] = master.detach()
        state = base.state.get(master, {})
        for key, value in {**({"step": counters.get(id(master))} if state else {}), **state}.items():
            if value is not None:
                found[f"optim.{name}.{key}"] = value.detach() if torch.is_tensor(value) else _scalar(torch, value)
    return found


def _whole_flats(engine: Any, torch: Any) -> dict[str, Any]:
    """The same with one flat buffer for each group."""
    inner, found = engine.optimizer, {}
    for parameters, flat in zip(inner.fp16_groups, inner.fp32_groups_flat, strict=True):
        position = 0
        for parameter in parameters:
            name, stop = engine.param_names[parameter], position + parameter.numel()
            for key, value in {"master": flat, **inner.optimizer.state[flat]}.items():
                part = value.detach()[position:stop].view(parameter.shape) if value.dim() else value
                found[f"optim.{name}.{key}"] = part
            position = stop
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
