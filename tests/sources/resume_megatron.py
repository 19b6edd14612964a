"""Load a checkpoint with Megatron-core itself under another parallelism, and save what was loaded.

Started by ``test_megatron_loads.py`` with torchrun; ``OPTIONS`` are those of make_megatron.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from make_megatron import build, gather, sharded_states, start, train


def keep_step(kind: Any) -> None:
    """With torch's Adam, whose step is a state like others, Megatron 0.16 asks the loaded tensors for it."""
    plain = kind._set_main_param_and_optimizer_states

    def patched(self: Any, parameter: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        plain(self, parameter, {**tensors, "step": state["step"].clone()})

    kind._set_main_param_and_optimizer_states = patched


def main() -> None:
    options = json.loads(os.environ["OPTIONS"])
    torch = start(options)
    from megatron.core import dist_checkpointing
    from safetensors.torch import save_file

    chunks, optimizer = build(torch, options)
    if options.get("distributed"):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        keep_step(DistributedOptimizer)
        train(torch, chunks, optimizer, 7)  # with torch's Adam Megatron wants states before it loads them
    state = sharded_states(chunks, optimizer, options, loading=True)
    loaded = dist_checkpointing.load(state, os.environ["CHECKPOINT"])
    for number, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{number}" if len(chunks) > 1 else "model"])
    optimizer.load_state_dict(loaded["optimizer"])
    found = gather(torch, sharded_states(chunks, optimizer, options), optimizer, options)
    assert loaded["iteration"] == 3
    if torch.distributed.get_rank() == 0:
        tensors = {name: tensor.contiguous().clone() for name, tensor in found.items()}
        save_file(tensors, Path(os.environ["OUT"]) / "loaded.safetensors")
    train(torch, chunks, optimizer, 3)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
