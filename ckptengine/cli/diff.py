"""``ckptengine diff A B``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ckptengine.cli import parser
from ckptengine.cli.meter import Meter
from ckptengine.cli.text import counted
from ckptengine.operations.diff import Difference, diff
from ckptengine.operations.opening import open_any

_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    arguments = parser("diff", "Compare two checkpoints across layouts and formats; exit status 1 where they differ.")
    arguments.add_argument("a", metavar="A", help="a checkpoint: PATH, URL or PATH@STEP")
    arguments.add_argument("b", metavar="B", help="the other one")
    arguments.add_argument("--rules", metavar="FILE|PRESET", help="how to read a checkpoint that needs rules")
    arguments.add_argument("--tensors-only", action="store_true", help="leave plain values out of the comparison")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    a, b = open_any(options.a, None, options.rules), open_any(options.b, None, options.rules)
    with Meter("comparing") as meter:
        found = diff(a, b, values=not options.tensors_only, progress=meter.progress)
    sys.stdout.write(json.dumps(found.to_json()) + "\n" if options.json else _text(found))
    return 0 if found.same else 1


def _text(found: Difference) -> str:
    lines: list[str] = []
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        if names:
            lines.append(f"{title} ({len(names)}): {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}")
    for d in found.differing[:_SHOWN]:
        if d.kind == "values":
            largest = "not a number on one side" if d.largest is None else f"largest difference {d.largest:.6g}"
            where = f" at {list(d.at)}" if d.at else ""
            verb = "differs" if d.elements == 1 else "differ"
            lines.append(f"{d.name}: {counted(d.elements, 'element')} {verb}, {largest}{where}: {d.a} and {d.b}")
        else:
            lines.append(f"{d.name}: {d.kind} {d.a} and {d.b}")
    if len(found.differing) > _SHOWN:
        lines.append(f"... and {len(found.differing) - _SHOWN} more tensors differ")
    for v in found.values[:_SHOWN]:
        lines.append(f"value {v.path}: {'nothing' if v.a is None else v.a} and {'nothing' if v.b is None else v.b}")
    if len(found.values) > _SHOWN:
        lines.append(f"... and {len(found.values) - _SHOWN} more values differ")
    equal = found.tensors - len(found.differing)
    lines.append(
        f"{'same' if found.same else 'different'}: {equal} of {found.tensors} common tensors are equal "
        f"({found.by_digest} by digest, {found.by_value} compared by value){_rest(found)}"
    )
    return "\n".join(lines) + "\n"


def _rest(found: Difference) -> str:
    """What beside common tensors makes a difference."""
    parts = [
        f"{counted(count, what)} {where}"
        for count, what, where in (
            (len(found.only_a), "tensor", "only in A"),
            (len(found.only_b), "tensor", "only in B"),
            (len(found.values), "value", "not equal"),
        )
        if count
    ]
    return "".join(f"; {part}" for part in parts)
