"""``ckptengine show PATH[@STEP]``."""

from __future__ import annotations

import json
import posixpath
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptengine.cli import parser
from ckptengine.cli.optional import optional_module
from ckptengine.cli.text import counted, number_text, size_text, table
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import BoxReader
from ckptengine.sources.jsonvalues import to_json
from ckptengine.sources.port import Source

_SHOWN = 2000
"""Characters of the values that are shown."""
_MOST_BITS = 10_000
"""Of a whole number that is shown in decimal: Python refuses to write much longer ones."""


def main(argv: Sequence[str]) -> int:
    arguments = parser("show", "Show what is in a checkpoint: tensors, shardings, digests, values.")
    arguments.add_argument("path", metavar="PATH", help="a checkpoint of any format: PATH, URL or PATH@STEP")
    arguments.add_argument("--tensors", action="store_true", help="list every tensor")
    arguments.add_argument("--layout", action="store_true", help="list every tensor with its sharding and fragments")
    arguments.add_argument("--rules", metavar="FILE|PRESET", help="how to read a checkpoint that needs rules")
    arguments.add_argument("--refs", metavar="FILE", help="export kerchunk-style references for stock zarr and fsspec")
    arguments.add_argument("--policy", action="store_true", help="what the measured saves of a root advise")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    if options.policy:
        return int(optional_module("ckptengine.cli.show_policy").show(options.path, as_json=options.json))
    source = open_any(options.path, None, options.rules)
    if options.refs:
        references = optional_module("ckptengine.universal.refs", "zarr").refs(source, BoxReader)
        Path(options.refs).write_text(json.dumps(references))
        sys.stdout.write(f"references to {counted(len(references['refs']), 'key')} written to {options.refs}\n")
        return 0
    document = {**describe(source, fragments=options.layout), "path": _where(source, options.path)}
    if options.json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.write(_text(document, tensors=options.tensors or options.layout, layout=options.layout))
    return 0


def _where(source: Source, path: str) -> str:
    """The checkpoint's folder, or the file in it that was named."""
    root = source.files.root.rstrip("/")
    name = posixpath.basename(path.rstrip("/"))
    is_file = posixpath.basename(root) != name and name in source.files.entries()
    return f"{root}/{name}" if is_file else source.files.root


def describe(source: Source, *, fragments: bool) -> dict[str, Any]:
    """The stable JSON document: format, step, metrics, tensors, aliases, values."""
    tensors: list[dict[str, Any]] = []
    aliases = source.aliases()
    for name in sorted(name for name in source.names() if name not in aliases):
        tensor = source.tensor(name)
        entry: dict[str, Any] = {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "digest": tensor.digest,
            "layout": tensor.meta,
        }
        if fragments:
            entry["fragments"] = [[f.box.offsets, f.box.shape, f.file, f.offset] for f in tensor.fragments]
        tensors.append(entry)
    return {
        "path": source.files.root,
        "format": source.format,
        "step": source.step,
        "metrics": dict(source.metrics),
        "nbytes": sum(tensor["nbytes"] for tensor in tensors),
        "tensors": tensors,
        "aliases": dict(aliases),
        "values": _values(source),
    }


def _values(source: Source) -> Any:
    """Values as JSON; what JSON and our extensions of it cannot say is shown as text."""
    return to_json(_shown(source.values()))


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, (str, int)) else repr(key): _shown(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(part) for part in value]
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"{value:#x}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... (all of it with --json)"


def _text(document: dict[str, Any], *, tensors: bool, layout: bool) -> str:
    head = [
        f"{document['path']}",
        f"  format   {document['format']}",
        f"  step     {document['step'] if document['step'] is not None else '-'}",
        f"  tensors  {len(document['tensors'])}, {size_text(document['nbytes'])}",
    ]
    if document["metrics"]:
        metrics = (f"{name}={number_text(value)}" for name, value in document["metrics"].items())
        head.append("  metrics  " + " ".join(metrics))
    if document["aliases"]:
        head.append("  tied     " + ", ".join(f"{a} = {b}" for a, b in document["aliases"].items()))
    text = "\n".join(head) + "\n"
    if not tensors:
        return text + "  values   " + _cut(json.dumps(document["values"])) + "\n"
    rows = [["name", "dtype", "shape", "size", "digest", *(["layout", "fragments"] if layout else [])]]
    for tensor in document["tensors"]:
        row = [
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            size_text(tensor["nbytes"]),
            tensor["digest"] or "-",
        ]
        if layout:
            row += [json.dumps(tensor["layout"]), str(len(tensor["fragments"]))]
        rows.append(row)
    return text + "\n" + table(rows)
