"""A training job to be signalled and killed: ``python job.py ROOT STEPS [options]``, alone or under torchrun.

Each line on standard output is a fact: ``restored N``, ``trained N``, ``committed N``, ``durable N``.  A durable step
was acknowledged: it must restore bit-identical whatever happens afterwards.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ckptengine as ce
from tests.levels.jobs import is_exactly, set_state, state_of


def say(what: str, step: int) -> None:
    os.write(1, f"{what} {step}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("steps", type=int)
    parser.add_argument("--tier", action="append", default=[], help="PATH[,EVERY[,BYTES PER SECOND]]")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--sigterm", type=float, default=None)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--keep", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    tiers = []
    for text in options.tier:
        path, every, cap = (*text.split(","), "", "")[:3]
        interval = ce.Every(steps=int(every)) if every else None
        tiers.append(ce.Tier(path, interval=interval, max_bytes_per_s=float(cap) if cap else None))
    state = state_of(0)
    with ce.Checkpointer(
        state,
        options.root,
        tiers=tiers,
        interval=ce.Every(steps=options.every),
        keep=ce.Keep(last=options.keep),
        sigterm_s=options.sigterm,
        random=False,
    ) as checkpointer:
        start = checkpointer.restore() or 0
        assert is_exactly(state, start)
        say("restored", start)
        for step in range(start + 1, options.steps + 1):
            time.sleep(options.pause)
            checkpointer.fence()
            set_state(state, step)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            handle = checkpointer.step(step)
            say("trained", step)
            if handle is not None:
                handle.add_done_callback(lambda h: say("durable" if h.stage == "durable" else h.stage, h.step))
    say("ended", options.steps)


if __name__ == "__main__":
    main()
