"""What docs/tiers.md quotes of bench/results/levels/: one line for each result, made from its JSON.

``python -m bench.levels_page`` prints the lines; a test holds the page against them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "levels"


def _kills(figures: Mapping[str, Any]) -> str:
    counts = figures["counts"]
    wrong = len(figures["problems"])
    return (
        f"{figures['kills']} kills at random moments, {counts.get('killed in a drain', 0)} of them in the middle of a "
        f"drain: {counts['durable']} checkpoints acknowledged as durable; lost, wrong or left over after `prune`: "
        f"{wrong}"
    )


def _memory(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['size_bytes'] / 1e9:.1f} GB from the local disk to S3 ({figures['server']}): at most "
        f"{figures['above_baseline_bytes'] / (1 << 20):.0f} MiB above the baseline (floor 256 MiB)"
    )


def _restore(figures: Mapping[str, Any]) -> str:
    return (
        f"restore of {figures['size_bytes'] / 1e9:.1f} GB: {figures['memory_bytes_per_s'] / 1e9:.2f} GB/s from host "
        f"memory, {figures['disk_bytes_per_s'] / 1e9:.2f} GB/s from the local disk, out of the page cache: "
        f"{figures['times_faster']:.1f} times as fast (floor 3)"
    )


def _stolen(figures: Mapping[str, Any]) -> str:
    return (
        f"a training step while a drain runs is slower by {100 * figures['slower_while_draining']:.1f} %, for "
        f"{figures['drain_s']:.1f} s; with a drain each {figures['every_s']:.0f} s that is "
        f"{100 * figures['stolen_fraction']:.2f} % of the time (floor 1 %)"
    )


def _drain(figures: Mapping[str, Any]) -> str:
    rates = figures["median_mb_per_s"]
    return (
        f"{figures['size_bytes'] / 1e9:.1f} GB from the local disk to S3 ({figures['server']}), verified and proven "
        f"there: {rates['drain']:.0f} MB/s, a plain multipart client beside it {rates['client']:.0f} MB/s: "
        f"{100 * figures['ratio']:.0f} % (floor 80 %)"
    )


LINES = {"drain": _drain, "kills": _kills, "memory": _memory, "restore": _restore, "stolen": _stolen}


def lines(folder: Path = RESULTS) -> list[str]:
    """One Markdown item for each result, by file name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        found.append(f"- {document['date'][:10]}: {LINES[document['levels']](document['figures'])}")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
