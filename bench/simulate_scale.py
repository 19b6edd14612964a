"""Metadata and plans of very large jobs, made without data: sizes, seconds and memory beside torch DCP's, with floors.

``python -m bench.simulate_scale [--json FILE] [--large]``.  Manifests and indexes are really encoded and decoded; plans
are those that a restore carries out.  ``--large`` adds 10,000 ranks x 10,000 tensors, where DCP is extrapolated from
its cost per fragment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

MB = 1e6
_ENGINES = ("ckptengine", "dcp-save")


def measure(engine: str, ranks: int, tensors: int, target_ranks: int) -> dict[str, Any]:
    """One simulation in a process of its own, so that its peak memory is its own."""
    code = (
        "import json, resource, sys; from bench.workloads.metadata import *\n"
        f"names = [f'model.layers.{{n // 8}}.block.part_{{n % 8}}.weight' for n in range({tensors})]\n"
        f"figures = SIMULATIONS[{engine!r}]({ranks}, names, ({ranks} * ROWS_PER_RANK, COLUMNS), {target_ranks})\n"
        "figures['peak_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(json.dumps(figures))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"engine": engine, "ranks": ranks, "tensors": tensors, "target_ranks": target_ranks, **found}


def extrapolated(small: dict[str, Any], ranks: int, tensors: int) -> dict[str, Any]:
    """What grows with the number of fragments, at another number of them."""
    factor = ranks * tensors / (small["ranks"] * small["tensors"])
    scaled = {
        key: small[key] * factor
        for key in ("metadata_bytes", "central_bytes", "read_by_one_rank_bytes", "plan_save_s", "plan_restore_s")
    }
    return {**small, "ranks": ranks, "tensors": tensors, "target_ranks": ranks // 2, "extrapolated": True, **scaled}


def floors(own: dict[str, Any], dcp: dict[str, Any], *, large: bool) -> dict[str, tuple[float, float]]:
    """(found, allowed) of every floor."""
    found = {
        "central bytes": (own["central_bytes"], 64 * MB if large else 2 * MB),
        "restore plan of one rank, s": (own["plan_restore_s"], 10.0 if large else 1.0),
        "metadata in all, part of DCP's": (own["metadata_bytes"] / dcp["metadata_bytes"], 1 / 3),
        "read by one rank, part of DCP's": (own["read_by_one_rank_bytes"] / dcp["read_by_one_rank_bytes"], 1 / 50),
    }
    if large:
        found["peak memory, bytes"] = (own["peak_bytes"], 1e9)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    runs = [measure(engine, 1024, 1000, 512) for engine in _ENGINES]
    checks = [("1,024 ranks x 1,000 tensors", floors(runs[0], runs[1], large=False))]
    growth = [measure("ckptengine", ranks, 1000, ranks // 2) for ranks in (256, 4096)]
    if arguments.large:
        large = measure("ckptengine", 10_000, 10_000, 5000)
        beside = extrapolated(runs[1], 10_000, 10_000)
        runs += [large, beside]
        checks.append(("10,000 ranks x 10,000 tensors (DCP extrapolated)", floors(large, beside, large=True)))
    runs += growth
    missed = 0
    for title, found in checks:
        print(title)
        for what, (figure, allowed) in found.items():
            missed += figure > allowed
            print(f"  {what:34} {figure:14,.4g}   floor {allowed:12,.4g}   {'ok' if figure <= allowed else 'MISSED'}")
    for run in runs:
        mark = " (extrapolated)" if run.get("extrapolated") else ""
        print(
            f"{run['engine']:10}{mark} {run['ranks']:6} x {run['tensors']:6} -> {run['target_ranks']:5}: "
            f"manifest {run['central_bytes'] / MB:9.2f} MB, all {run['metadata_bytes'] / MB:10.1f} MB, one rank reads "
            f"{run['read_by_one_rank_bytes'] / MB:9.2f} MB, plan to save {run['plan_save_s']:8.2f} s, to restore "
            f"{run['plan_restore_s']:7.2f} s, {run['fragments_of_one_rank']} fragments, "
            f"peak {run['peak_bytes'] / MB:.0f} MB"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"runs": runs, "floors": dict(checks)}, file, indent=1)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
