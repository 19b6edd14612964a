"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ckptengine.errors import CheckpointError, UnusableRequest

from . import main as runs
from .names import ENGINES
from .options import DEFAULT_WORKLOADS, SIZES, WORKLOADS, Options

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_bytes(text: str) -> int:
    """Bytes from "1500000000", "512M", "1.5G" or "1GiB"."""
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = plain[-1:] if plain[-1:] in UNITS else ""
    try:
        return int(float(plain.removesuffix(unit) if unit else plain) * UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 512M or 1.5G") from None


def numbers(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,10") from None


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _add_run_options(made: argparse.ArgumentParser) -> None:
    """How long, where, and what to write."""
    made.add_argument(
        "--saves", type=int, default=None, metavar="N", help="measured saves (or restores) per process outside stall"
    )
    made.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda; skipped where there is no such device")
    made.add_argument(
        "--directory", default=None, metavar="DIR", help="where to write; names the disk that is measured"
    )
    made.add_argument(
        "--time-limit",
        type=float,
        default=None,
        metavar="MINUTES",
        help="start no further job after this long; what was not run is said (repetitions are what goes first)",
    )
    made.add_argument(
        "--json",
        default=None,
        metavar="FILE",
        help="write every raw sample; a run that was cut off left FILE.journal, from which the same command goes on",
    )
    made.add_argument("--plot", default=None, metavar="FILE", help="draw the picture (png, svg, pdf)")


def parser() -> argparse.ArgumentParser:
    """The parser, every option documented."""
    made = argparse.ArgumentParser(
        prog="ckptengine bench",
        description="Measure what checkpointing costs a training loop on this machine, beside other engines.",
    )
    made.add_argument(
        "--workload",
        type=names,
        default=DEFAULT_WORKLOADS,
        metavar="W,...",
        help=f"what to measure: all, or of {', '.join(WORKLOADS)} (default: {','.join(DEFAULT_WORKLOADS)})",
    )
    made.add_argument("--size", choices=SIZES, default="small", help="tiny (does it run), small, or real (1.5 GB)")
    made.add_argument("--tiny", action="store_const", const="tiny", dest="size", help="short for --size tiny")
    made.add_argument(
        "--rivals",
        type=names,
        default=None,
        metavar="R,...",
        help=f"engines to measure: of {', '.join(ENGINES)}, or none (default: all that are installed)",
    )
    made.add_argument("--state-bytes", type=size_bytes, default=None, metavar="N", help="size of the state: 512M, 1.5G")
    made.add_argument("--steps", type=int, default=None, metavar="N", help="steps per measured block")
    made.add_argument(
        "--every",
        type=numbers,
        default=None,
        metavar="K,...",
        help="a block of steps for each, with a save every K-th step (1,2,10); repeat K for more samples (2,2,2)",
    )
    made.add_argument(
        "--threads",
        type=numbers,
        default=None,
        metavar="T,...",
        help="torch compute threads (default: all cores but one)",
    )
    made.add_argument(
        "--ranks", type=numbers, default=(4, 2), metavar="N,M", help="reshard: save on N ranks, restore on M (4,2)"
    )
    made.add_argument("--simulated", type=numbers, default=None, metavar="R,T", help="metadata: ranks and tensors")
    made.add_argument("--tensors", type=int, default=None, metavar="N", help="many-small: how many")
    made.add_argument("--repetitions", type=int, default=None, metavar="N", help="fresh processes per engine")
    _add_run_options(made)
    return made  # fmt: skip


def options_from(arguments: argparse.Namespace) -> Options:
    """Validated options; raises `UnusableRequest`."""
    engines: tuple[str, ...] | None = arguments.rivals
    if engines is not None:
        wanted = tuple(name for name in engines if name != "none")
        unknown = [name for name in wanted if name not in ENGINES]
        if unknown:
            raise UnusableRequest(f"no such rival: {', '.join(unknown)}; there are {', '.join(ENGINES)}")
        always = ("none", "pwrite", "ckptengine")
        engines = (*always, *(name for name in ENGINES if name in wanted and name not in always))
    if arguments.simulated is not None and len(arguments.simulated) != 2:
        raise UnusableRequest("--simulated takes two numbers, ranks and tensors, such as 1024,1000")
    if len(arguments.ranks) != 2:
        raise UnusableRequest("--ranks takes two numbers, the ranks that save and those that restore, such as 4,2")
    return Options(
        size=arguments.size,
        workloads=WORKLOADS if arguments.workload == ("all",) else arguments.workload,
        engines=engines,
        state_bytes=arguments.state_bytes,
        steps=arguments.steps,
        every=arguments.every,
        threads=arguments.threads,
        ranks=arguments.ranks,
        repetitions=arguments.repetitions,
        saves=arguments.saves,
        tensors=arguments.tensors,
        simulated=arguments.simulated,
        device=arguments.device,
        directory=arguments.directory,
        time_limit_s=None if arguments.time_limit is None else arguments.time_limit * 60,
    )


def main(argv: Sequence[str]) -> int:
    """Run, show, write.  0 done, 1 an engine of ours saved wrong bytes or failed, 2 the request is unusable."""
    arguments = parser().parse_args(argv)
    # Ended from outside, a run still ends its jobs and removes what they wrote: at `real` that is gigabytes.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        options = options_from(arguments)
        document = runs.run(options, None if arguments.json is None else Path(arguments.json))
        runs.show(document, sys.stdout)
        runs.write(document, arguments.json, arguments.plot)
    except (CheckpointError, OSError) as error:
        print(f"ckptengine bench: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if runs.own_failures(document) else 0
