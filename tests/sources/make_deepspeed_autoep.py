"""Write small checkpoints of DeepSpeed's AutoEP, and beside each the truth from DeepSpeed's own converter and memory.

Needs deepspeed >= 0.19, transformers and safetensors (CPU is enough): ``torchrun --nproc-per-node 4
tests/sources/make_deepspeed_autoep.py OUT CASE`` writes ``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.safetensors``.
Masters and states are what ``ds_to_universal`` makes of the checkpoint, weights what the ranks hold.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "autoep2_dp4_zero1": {"zero_optimization": {"stage": 1}},
    "autoep2_dp4_zero2_data_first": {
        "zero_optimization": {"stage": 2}, "use_data_before_expert_parallelism": True},
    "autoep2_dp4_zero3": {"zero_optimization": {"stage": 3, "sub_group_size": 300}},
}  # fmt: skip


def main(out: Path, case: str) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import deepspeed
    import torch
    from safetensors.torch import save_file

    transformers: Any = importlib.import_module("transformers")
    output_capturing: Any = importlib.import_module("transformers.utils.output_capturing")
    registry = getattr(output_capturing, "_CanRecordRegistry", None)
    if registry is not None:  # newer transformers has a method of this name that DeepSpeed 0.19 does not expect
        known = registry.get
        registry.get = lambda held, key, *other: dict.get(held, key, *other) if other else known(held, key)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        vocab_size=7, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(settings)
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "use_grouped_mm": False, "preset_model": "mixtral"},
        **CASES[case],
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, config=config)[0]
    rank = torch.distributed.get_rank()
    for turn in range(2):
        tokens = (torch.arange(8)[None] * (rank + 1) + turn) % 7
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(out / case / "checkpoint"), tag="global_step2")
    stage = CASES[case]["zero_optimization"]["stage"]
    held = {name: tensor.detach().clone() for name, tensor in engine.module.named_parameters()} if stage < 3 else {}
    everyone: list[Any] = [None] * 4
    torch.distributed.all_gather_object(everyone, held)
    if rank == 0:
        masters = converted(out / case / "checkpoint" / "global_step2")
        second = 2 if "use_data_before_expert_parallelism" in CASES[case] else 1
        weights = {
            name: torch.cat([tensor, everyone[second][name]]) if ".experts.w" in name else tensor
            for name, tensor in everyone[0].items()
        } or {name.removeprefix("optim.").removesuffix(".master"): tensor for name, tensor in masters.items()
              if name.endswith(".master")}  # fmt: skip
        found = {f"model.{name}": tensor for name, tensor in weights.items()}
        states = {name: t for name, t in masters.items() if f"model.{name.rpartition('.')[0][6:]}" in found}
        save_file(
            {name: t.clone().contiguous() for name, t in (found | states).items()}, out / case / "truth.safetensors"
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def converted(folder: Path) -> dict[str, Any]:
    """The masters and states that DeepSpeed's converter makes, by canonical name, in the shapes of their parameters."""
    import torch
    from deepspeed.checkpoint.ds_to_universal import main as convert

    shapes: dict[str, Any] = {}
    for file in folder.glob("*mp_rank_00_model_states.pt"):
        listed = torch.load(file, weights_only=False)
        for group in listed.get("param_shapes") or []:
            for name, shape in group.items():
                experts = (4, *shape[1:]) if ".experts.w" in name else tuple(shape)
                shapes[name] = experts
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        options = argparse.Namespace(
            input_folder=str(folder), output_folder=made, num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )  # fmt: skip
        convert(options)
        for file in (Path(made) / "zero").glob("*/*.pt"):
            held = torch.load(file, weights_only=False)
            tensor = held["param"] if isinstance(held, dict) else held
            name = file.parent.name
            if torch.is_tensor(tensor) and name in shapes and file.stem != "step":
                kind = "master" if file.stem == "fp32" else file.stem
                found[f"optim.{name}.{kind}"] = tensor.float().reshape(shapes[name]).clone()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
