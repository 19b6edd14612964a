"""``ckptengine verify PATH[@STEP]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ckptengine.cli import parser
from ckptengine.cli.meter import Meter
from ckptengine.cli.text import counted
from ckptengine.errors import CheckpointError, Damaged
from ckptengine.operations.opening import open_any
from ckptengine.operations.verify import verify
from ckptengine.tiers.redact import redacted_url


def main(argv: Sequence[str]) -> int:
    arguments = parser("verify", "Check every byte of a checkpoint against its digest; exit status 1 if any is wrong.")
    arguments.add_argument("path", metavar="PATH", help="a checkpoint of any format: PATH, URL or PATH@STEP")
    arguments.add_argument("--rules", metavar="FILE|PRESET", help="how to read a checkpoint that needs rules")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    step: int | None = None
    kind, shown = "unknown", redacted_url(options.path)
    tensors = unproven = 0
    problems: list[CheckpointError]
    try:
        source = open_any(options.path, None, options.rules)
        step, kind, tensors = source.step, source.format, len(source.names())
        with Meter("verifying") as meter:
            problems, unproven = verify(source, meter.progress)
    except Damaged as damage:  # found before the first tensor could be looked at
        problems = [damage]
    if options.json:
        told = [{"code": problem.code, "message": str(problem)} for problem in problems]
        document = {"path": shown, "format": kind, "step": step, "good": not problems, "unproven": unproven}
        sys.stdout.write(json.dumps({**document, "problems": told}) + "\n")
    elif problems:
        sys.stdout.write("".join(f"{problem.code}: {problem}\n" for problem in problems))
        sys.stdout.write(f"{shown}: DAMAGED, {counted(len(problems), 'problem')}\n")
    else:
        which = "" if step is None else f" step {step}"
        many = "it records no digests" if unproven == tensors else f"of {unproven} it records no digests"
        proven = f"; {many}: all that can be told is that their bytes can be read" if unproven else ""
        sys.stdout.write(f"{shown}:{which} holds: {counted(tensors, 'tensor')} of a {kind} checkpoint{proven}\n")
    return 1 if problems else 0
