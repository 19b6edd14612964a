"""What the trace of a stall block says: blocked, slower, stolen, durable, end to end.  Pure."""

from __future__ import annotations

from typing import Any


def stolen(plain_step_s: float, block: dict[str, Any]) -> list[dict[str, float]]:
    """Per save of a block: blocked, slow-down of the steps that ran while it was in flight, and durable after.

    With several saves in flight at once a step is charged to the newest.  A save counts where the block saw it to
    its end: it was durable before the block's last step, or another save would have been due by then.
    """
    trace = block["trace"]
    samples = []
    saves = trace["saves"]
    for number, save in enumerate(saves):
        until = saves[number + 1]["start_s"] if number + 1 < len(saves) else float("inf")
        after = [step for step in trace["steps"] if save["start_s"] <= step[0] < until]
        during = [step for step in after if step[0] < save["durable_s"]]
        if len(after) < block["every"] and save["durable_s"] > trace["end_s"]:
            continue
        blocked = save["returned_s"] - save["start_s"] + save["fence_s"]
        slower = sum(end - start - held - plain_step_s for start, end, held in during)
        samples.append(
            {
                "blocked_s": blocked,
                "slower_s": slower,
                "stolen_s": blocked + slower,
                "durable_s": save["durable_s"] - save["start_s"],
            }
        )
    return samples


def end_to_end(plain_step_s: float, block: dict[str, Any]) -> float:
    """The block until its last save was durable, over the same number of plain steps."""
    trace = block["trace"]
    ratio: float = trace["drained_s"] / (len(trace["steps"]) * plain_step_s)
    return ratio
