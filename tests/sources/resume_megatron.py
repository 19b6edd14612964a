"""Load a checkpoint with Megatron-core itself under another parallelism, and save what was loaded.

Started by ``test_megatron_loads.py`` with torchrun; ``OPTIONS`` are those of make_megatron.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from make_megatron import build, gather, sharded_states, start, train


def main() -> None:
    options = json.loads(os.environ["OPTIONS"])
    torch = start(options)
    from megatron.core import dist_checkpointing
    from safetensors.torch import save_file

    chunks, optimizer = build(torch, options)
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
