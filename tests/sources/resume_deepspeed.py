"""Load a checkpoint with DeepSpeed itself, gather what it loaded, train on, and save what was gathered.

Started by ``test_deepspeed_resumes.py`` with torchrun; ``OPTIONS`` are those of make_deepspeed.py and ``universal``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

if __package__:
    from .make_deepspeed import build, gather, train
else:
    from make_deepspeed import build, gather, train


def main() -> None:
    options = json.loads(os.environ["OPTIONS"])
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(99)
    engine = build(deepspeed, torch, options)
    path, client = engine.load_checkpoint(os.environ["CHECKPOINT"])
    assert path is not None, "DeepSpeed found no checkpoint"
    loaded = gather(engine, torch, options)
    if torch.distributed.get_rank() == 0:
        tensors = {name: tensor.contiguous().clone() for name, tensor in loaded.items()}
        save_file(tensors, Path(os.environ["OUT"]) / "loaded.safetensors")
        notes = {"note": client.get("note"), "steps": engine.global_steps}
        (Path(os.environ["OUT"]) / "notes.json").write_text(json.dumps(notes))
    before = engine.global_steps
    train(engine, torch, options)
    assert engine.global_steps == before + 3
    for parameter in engine.module.parameters():
        assert torch.isfinite(parameter).all()


if __name__ == "__main__":
    main()
