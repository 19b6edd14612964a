"""A JSON document with its own digest: one header line, then the body.

Header and body are in canonical form (sorted keys, no spaces, ASCII), and the reader compares the header with its own
encoding of it, so that no flipped bit anywhere goes unseen.
"""

from __future__ import annotations

import json
from typing import Any

from ckptengine import native
from ckptengine.errors import DigestMismatch, Truncated, UnreadableFormat

VERSION = (1, 0)
"""Version of the format that this code writes.  Readers refuse a newer major."""


_SLICE = 1000
"""Elements of a list that are encoded by one call, which keeps every other thread of the interpreter waiting."""
_SMALL = 32
"""Containers of at most this many elements are looked into for long lists."""


def canonical(document: object) -> bytes:
    """The one encoding of a JSON document: sorted keys, no spaces, ASCII, no NaN."""
    return _dumps(document).encode()


def canonical_in_slices(value: object) -> str:
    """What `canonical` gives, but long lists, which a checkpoint of very many tensors has, a slice at a time."""
    if isinstance(value, list) and len(value) > _SLICE:
        slices = (_dumps(value[first : first + _SLICE])[1:-1] for first in range(0, len(value), _SLICE))
        return f"[{','.join(slices)}]"
    if isinstance(value, list) and len(value) <= _SMALL:
        return f"[{','.join(map(canonical_in_slices, value))}]"
    if isinstance(value, dict) and len(value) <= _SMALL and all(isinstance(key, str) for key in value):
        return "{" + ",".join(f"{_dumps(key)}:{canonical_in_slices(value[key])}" for key in sorted(value)) + "}"
    return _dumps(value)


def _dumps(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _header(kind: str, version: tuple[int, int], body: bytes) -> bytes:
    """The header line; its digest is that of the line without the digest, and the body: a flip in either shows."""
    facts: dict[str, object] = {"ckptengine": kind, "version": list(version), "bytes": len(body)}
    digest = native.digest(canonical(facts) + b"\n" + body)
    return canonical({**facts, "digest": digest}) + b"\n"


def seal(kind: str, body: object) -> bytes:
    """Encode ``body`` as a document of ``kind`` with its digest in front."""
    encoded = canonical_in_slices(body).encode()
    return _header(kind, VERSION, encoded) + encoded


def unseal(kind: str, data: bytes, where: str) -> Any:
    """The body of a sealed document of ``kind``.

    Raises `UnreadableFormat` (not ours, another kind, a newer major version), `Truncated` or `DigestMismatch`;
    ``where`` names the file in the message.
    """
    line, newline, body = data.partition(b"\n")
    try:
        header = json.loads(line)
        version, nbytes = header["version"], header["bytes"]
        major, minor = version
        found = header["ckptengine"]
        if type(major) is not int or type(minor) is not int or type(nbytes) is not int:
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise DigestMismatch(f"{where}: the header line is damaged or this is no ckptengine file") from None
    if major > VERSION[0] and line == canonical(header):
        raise UnreadableFormat(
            f"{where}: written as format version {major}.{minor}; this ckptengine reads up to {VERSION[0]}.x: "
            "upgrade it"
        )
    if found != kind:
        raise UnreadableFormat(f"{where}: holds a {found!r}, not a {kind!r}")
    if not newline or len(body) != nbytes:
        raise Truncated(f"{where}: has {len(body)} bytes of body, {nbytes} were written")
    if major < 1 or _header(kind, (major, minor), body) != line + newline:
        raise DigestMismatch(f"{where}: the bytes do not match their digest {header.get('digest')}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise UnreadableFormat(f"{where}: the body is not JSON") from None
