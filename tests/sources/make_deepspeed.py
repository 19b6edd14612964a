"""Write small checkpoints with DeepSpeed itself, and beside each the truth that DeepSpeed gathers.

Needs deepspeed (CPU is enough).  ``python tests/sources/make_deepspeed.py OUT [CASE ...]`` starts one torchrun per case
and writes ``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.safetensors`` (canonical name -> tensor).
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# case -> (ranks, options)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1_dp3_fp16_tied": (3, {"stage": 1, "dtype": "fp16", "tied": True}),
    "zero2_dp3_roundrobin": (3, {"stage": 2, "zero": {"round_robin_gradients": True}}),
    "zero2_dp2_frozen": (2, {"stage": 2, "frozen": True}),
    "zero1_dp2_fp32_sgd": (2, {"stage": 1, "dtype": "fp32", "optimizer": "sgd"}),
    "zero2_dp3_elastic": (3, {"stage": 2, "zero": {"elastic_checkpoint": True}}),
    "zero1_dp2_aligned": (2, {"stage": 1, "zero": {"parameter_alignment": True}}),
    "zero1_dp1": (1, {"stage": 1}),
    "zero3_dp3_subgroups": (3, {"stage": 3, "zero": {"sub_group_size": 700}}),
    "zero3_dp3_frozen_tied": (3, {"stage": 3, "frozen": True, "tied": True}),
    "zero3_dp2_fp16_sgd": (2, {"stage": 3, "dtype": "fp16", "optimizer": "sgd"}),
    "zero1_dp5_rmsprop": (5, {"stage": 1, "optimizer": "rmsprop"}),
    "bf16_dp2_stage0": (2, {"stage": 0}),
    "fp32_dp2_stage0": (2, {"stage": 0, "dtype": "fp32"}),
    "pipeline_pp2_dp2": (4, {"stage": 1, "pipeline": 2}),
    "pipeline_pp2_dp1_tied": (2, {"stage": 0, "pipeline": 2, "tied": True}),
    "moe_ep2_dp4_zero2": (4, {"stage": 2, "moe": 2}),
    "moe_ep2_dp2_zero1": (2, {"stage": 1, "moe": 2}),
}


def main(out: Path, wanted: list[str]) -> None:
    for number, (case, (ranks, _)) in enumerate(CASES.items()):
        if wanted and case not in wanted:
            continue
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CASE": case,
            "OUT": str(out / case),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += [f"--master_port={29600 + number}", __file__]
        print(f"== {case}", flush=True)
        subprocess.run(command, env=environment, check=True)


def worker(case: str, out: Path) -> None:
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo")
    options = CASES[case][1]
    torch.manual_seed(7)
    engine = build(deepspeed, torch, options)
    train(engine, torch, options)
    engine.save_checkpoint(str(out / "checkpoint"), client_state={"note": "seven", "iteration": 3})
    truth = gather(engine, torch, options)
    if torch.distributed.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in truth.items()}, out / "truth.safetensors")


def build(deepspeed: Any, torch: Any, options: dict[str, Any]) -> Any:
    dtype = options.get("dtype", "bf16")
    zero = {"stage": options["stage"], "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 if "pipeline" in options else 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**zero, **options.get("zero", {})},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 4},
        "steps_per_print": 1000,
        "checkpoint": {"load_universal": bool(options.get("universal"))},
    }
    model = pipeline(deepspeed, torch, options) if "pipeline" in options else model_of(deepspeed, torch, options)
    if options.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "blocks.0.up" not in name and "position" not in name
    groups = split_groups(deepspeed, model, options)
    optimizers = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=1e-2),
    }
    optimizer = optimizers[options.get("optimizer", "adamw")]()
    arguments = {"model": model, "optimizer": optimizer, "config": config}
    if "pipeline" in options:
        arguments["model_parameters"] = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(**arguments)[0]


def split_groups(deepspeed: Any, model: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1, "name": "matrices"},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "name": "vectors"},
    ]
    if "moe" in options:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        return list(split_params_into_different_moe_groups_for_optimizer(groups))
    return groups


def model_of(deepspeed: Any, torch: Any, options: dict[str, Any]) -> Any:
    nn = torch.nn
    width, vocabulary, tied, experts = 11, 37, options.get("tied"), options.get("moe")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            if experts:
                from deepspeed.moe.layer import MoE

                expert = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))
                self.moe = MoE(width, copy.deepcopy(expert), num_experts=4, ep_size=experts, k=1, min_capacity=4)
            else:
                self.up = nn.Linear(width, 17)
                self.down = nn.Linear(17, width)
            self.register_buffer("scale", torch.full((3,), 0.5))

        def forward(self, x: Any) -> Any:
            if experts:
                return x + self.moe(self.norm(x))[0] * self.scale[0]
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) * self.scale[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.position = nn.Parameter(torch.randn(5, width) * 0.1)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(width, vocabulary, bias=False)
            if tied:
                self.head.weight = self.embed.weight
            self.register_buffer("seen", torch.arange(4))

        def forward(self, tokens: Any, labels: Any) -> Any:
            x = self.embed(tokens) + self.position
            for block in self.blocks:
                x = block(x)
            return nn.functional.cross_entropy(self.head(x).float().view(-1, vocabulary), labels.view(-1))

    return Model()


def pipeline(deepspeed: Any, torch: Any, options: dict[str, Any]) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    nn = torch.nn
    width, vocabulary = 11, 37

    class Head(nn.Embedding):
        def forward(self, x: Any) -> Any:
            return x @ self.weight.t()

    def loss(logits: Any, labels: Any) -> Any:
        return nn.functional.cross_entropy(logits.float().view(-1, vocabulary), labels.view(-1))

    if options.get("tied"):
        first = TiedLayerSpec("embed", nn.Embedding, vocabulary, width)
        last = TiedLayerSpec("embed", nn.Embedding, vocabulary, width, forward_fn=lambda m, x: x @ m.weight.t())
    else:
        first, last = LayerSpec(nn.Embedding, vocabulary, width), LayerSpec(Head, vocabulary, width)
    middle = [LayerSpec(nn.Linear, width, width), LayerSpec(nn.LayerNorm, width), LayerSpec(nn.Linear, width, width)]
    return PipelineModule(
        [first, *middle, last], num_stages=options["pipeline"], loss_fn=loss, partition_method="uniform"
    )


def train(engine: Any, torch: Any, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())

    def batch() -> Any:
        data = torch.randint(0, 37, (1, 6), generator=generator)
        return data[:, :-1], data[:, 1:]

    for _ in range(3):
        if "pipeline" in options:
            engine.train_batch(iter([batch(), batch()]))
        else:
            engine.backward(engine(*batch()))
            engine.step()


def gather(engine: Any, torch: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Every tensor under its canonical name on rank 0, by DeepSpeed's own consolidation."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "rmsprop": ("square_avg",)}
    keys = states[options.get("optimizer", "adamw")]
    truth: dict[str, Any] = {}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed links the first group only
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        master = safe_get_full_fp32_param(parameter)
        if master is None:
            state = engine.optimizer.state[parameter]
            truth |= {f"optim.{name}.{key}": state[key].detach() for key in (*keys, "step") if key in state}
            continue
        truth[f"optim.{name}.master"] = master.detach()
        if options["stage"] == 3:
            truth[f"model.{name}"] = master.detach()
        for key in keys:
            found = safe_get_full_optimizer_state(parameter, key)
            if found is not None:
                truth[f"optim.{name}.{key}"] = found.detach()
        if options.get("optimizer") != "sgd":
            truth[f"optim.{name}.step"] = torch.tensor(3.0)
    if options["stage"] == 3:
        import deepspeed

        for name, parameter in engine.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if not parameter.requires_grad:
                    truth[f"model.{name}"] = parameter.detach().clone()
            if parameter.requires_grad and f"model.{name}" not in truth:
                truth[f"model.{name}"] = safe_get_full_fp32_param(parameter).detach()
        truth |= {f"model.{name}": buffer.detach() for name, buffer in engine.module.named_buffers()}
    else:
        truth |= {f"model.{name}": tensor.detach() for name, tensor in engine.module.state_dict().items()}
    if options.get("zero", {}).get("round_robin_gradients"):
        truth |= from_flat(torch, engine, keys)
    if options["stage"] == 0 and hasattr(engine.optimizer, "fp32_groups"):
        truth |= from_unfused(engine, keys)
    return everywhere(torch, engine, truth, options)


def from_flat(torch: Any, engine: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """Masters and states from the flat groups: DeepSpeed's own gathering is wrong with round-robin gradients."""
    found: dict[str, Any] = {}
    optimizer = engine.optimizer
    for g, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        state = optimizer.optimizer.state[flat]
        for key, part in {"master": flat.detach(), **{key: state[key] for key in keys}}.items():
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part.contiguous())
            whole, position = torch.cat(parts), 0
            for parameter in optimizer.round_robin_bit16_groups[g]:
                name = engine.param_names[parameter]
                found[f"optim.{name}.{key}"] = whole[position : position + parameter.numel()].view(parameter.shape)
                position += parameter.numel()
                if key == "master":
                    assert (found[f"optim.{name}.master"].to(parameter.dtype) == parameter).all()
    return found


def from_unfused(engine: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """Masters and states of the optimizer that 16-bit training without ZeRO uses."""
    found: dict[str, Any] = {}
    for halves, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for half, master in zip(halves, masters, strict=True):
            name = engine.param_names[half]
            state = engine.optimizer.optimizer.state[master]
            found[f"optim.{name}.master"] = master.detach()
            found |= {f"optim.{name}.{key}": state[key].detach() for key in (*keys, "step")}
    return found


def everywhere(torch: Any, engine: Any, truth: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Add what other pipeline stages and expert ranks hold, experts under their global index."""
    world = torch.distributed.get_world_size()
    if "moe" in options:
        local = 4 // options["moe"]
        first = torch.distributed.get_rank() % options["moe"] * local
        marker = "deepspeed_experts."
        renamed = {}
        for name, tensor in truth.items():
            if marker in name:
                head, _, tail = name.partition(marker)
                index, _, rest = tail.partition(".")
                name = f"{head}{marker}{int(index) + first}.{rest}"
            renamed[name] = tensor
        truth = renamed
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, truth)
    merged: dict[str, Any] = {}
    for part in reversed(everyone):
        merged |= part
    return merged


if __name__ == "__main__":
    if "CASE" in os.environ:
        worker(os.environ["CASE"], Path(os.environ["OUT"]))
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
