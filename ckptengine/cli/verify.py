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
from ckptengine.sources.port import Checksummed, Source
from ckptengine.tiers.redact import redacted_url


def main(argv: Sequence[str]) -> int:
    arguments = parser("verify", "Check every byte of a checkpoint against its digest; exit status 1 if any is wrong.")
    arguments.add_argument("path", metavar="PATH", help="a checkpoint of any format: PATH, URL or PATH@STEP")
    arguments.add_argument("--rules", metavar="FILE|PRESET", help="how to read a checkpoint that needs rules")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    step: int | None = None
    kind, shown = "unknown", redacted_url(options.path)
    tensors, digests = 0, True
    problems: list[CheckpointError]
    try:
        source = open_any(options.path, None, options.rules)
        step, kind, tensors = source.step, source.format, len(source.names())
        with Meter("verifying") as meter:
            problems = verify(source, meter.progress)
        digests = bool(problems) or not tensors or _records_digests(source)
    except Damaged as damage:  # found before the first tensor could be looked at
        problems = [damage]
    if options.json:
        told = [{"code": problem.code, "message": str(problem)} for problem in problems]
        document = {"path": shown, "format": kind, "step": step, "good": not problems, "problems": told}
        sys.stdout.write(json.dumps(document) + "\n")
    elif problems:
        sys.stdout.write("".join(f"{problem.code}: {problem}\n" for problem in problems))
        sys.stdout.write(f"{shown}: DAMAGED, {counted(len(problems), 'problem')}\n")
    else:
        which = "" if step is None else f" step {step}"
        proven = "" if digests else "; it records no digests: all that can be told is that its bytes can be read"
        sys.stdout.write(f"{shown}:{which} holds: {counted(tensors, 'tensor')} of a {kind} checkpoint{proven}\n")
    return 1 if problems else 0


def _records_digests(source: Source) -> bool:
    if isinstance(source, Checksummed) and source.checksums():
        return True
    return any(source.tensor(name).digest is not None for name in source.names())
