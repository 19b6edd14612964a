"""The demo's picture: the loss curves with saves, kill and resume marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ckptengine.demo.story import Run, Story


def draw(story: Story, path: Path) -> None:
    """Write the picture as a PNG."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 6), height_ratios=[3, 1], sharex=True, layout="constrained")
    upper.plot(*_curve(story.straight), color="tab:blue", linewidth=4, alpha=0.35, label="never stopped")
    upper.plot(*_curve(story.resumed), color="tab:orange", linewidth=1.4, label="killed and resumed")
    committed = [save["step"] for save in story.resumed.saves if save["stage"] == "durable"]
    values = {step: float.fromhex(loss.split()[0]) for step, loss in story.resumed.losses.items()}
    losses = [values[step] for step in committed]
    upper.plot(committed, losses, "v", color="tab:green", markersize=7, label="durable checkpoint")
    killed, resumed = story.killed_at, story.resumed_from
    upper.axvline(killed, color="tab:red", linestyle="--", label=f"SIGKILL inside the save of step {killed}")
    upper.axvline(resumed, color="tab:purple", linestyle=":", label=f"resumed from step {resumed}")
    verdict = "every bit is the same" if story.same else "THE RUNS DIFFER"
    upper.set_title(f"A run killed in the middle of a save, resumed: {verdict}")
    upper.set_ylabel("loss (nats per byte)")
    upper.legend(fontsize=8)
    steps = [save["step"] for save in story.resumed.saves]
    blocked = [save.get("blocked_ms", 0.0) + save.get("fence_ms", 0.0) for save in story.resumed.saves]
    lower.bar(steps, blocked, width=1.2, color="tab:green")
    lower.set_ylabel("blocked (ms)")
    lower.set_xlabel("training step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(run: Run) -> tuple[list[int], list[float]]:
    steps = sorted(run.losses)
    return steps, [float.fromhex(run.losses[step].split()[0]) for step in steps]
