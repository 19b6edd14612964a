"""Canonical names as paths of a zarr hierarchy, and the tree that they make, listed lazily.

``model.layers.0.weight`` is the array ``model/layers/0/weight``.  Where a name is also the beginning of another one,
its array is the member ``=`` of the group of that name.  What a file name or a URL cannot hold is written ``%XX``; the
true name is always in the array's attributes, so nothing ever has to be decoded.
"""

from __future__ import annotations

import hashlib
import re
import string
from bisect import bisect_left
from collections.abc import Iterable, Iterator

SELF = "="
"""The member of a group that is the array of the group's own name; no component can be written like this."""

_PLAIN = re.compile(r"(?!__)[A-Za-z0-9_-]+(?:\.(?!__)[A-Za-z0-9_-]+)*")
_LONGEST = 200


class _Written(dict[int, str]):
    """What stands for a character: itself or, where a file name or a URL cannot hold it, its bytes as ``%XX``."""

    def __missing__(self, code: int) -> str:
        return "".join(f"%{byte:02X}" for byte in chr(code).encode("utf-8", "surrogatepass"))


_SAFE = {ord(character): character for character in string.ascii_letters + string.digits + "_-"}
_WRITTEN = _Written(_SAFE)
_WRITTEN |= {code: _WRITTEN[code] for code in range(128)}


def path_of(name: str) -> str:
    """The path of a name, without a leading slash; different names have different paths."""
    if _PLAIN.fullmatch(name) and len(name) <= _LONGEST:
        return name.replace(".", "/")
    return "/".join(_encode(component) for component in _components(name))


def _components(name: str) -> list[str]:
    """The name cut at dots that are not escaped with a backslash."""
    parts: list[str] = []
    current = ""
    for piece in name.split("."):
        current += piece
        if (len(current) - len(current.rstrip("\\"))) % 2:  # the dot that follows is escaped
            current += "."
        else:
            parts.append(current)
            current = ""
    return [*parts, current[:-1]] if current else parts


def _encode(component: str) -> str:
    encoded = component.translate(_WRITTEN)
    if encoded.startswith("__"):  # reserved by zarr
        encoded = "%5F" + encoded[1:]
    if len(encoded) > _LONGEST:  # longer than a file name may be
        digest = hashlib.sha256(component.encode("utf-8", "surrogatepass")).hexdigest()
        encoded = re.sub("%.?$", "", encoded[: _LONGEST - 33]) + SELF + digest[:32]
    return encoded or SELF + SELF


class NameTree:
    """Arrays by path and the groups above them; children are found by bisection, nothing is built per member."""

    def __init__(self, names: Iterable[str]) -> None:
        paths = {path_of(name): name for name in names}
        groups = {""}
        for path in paths:
            above = path.rpartition("/")[0]
            while above not in groups:
                groups.add(above)
                above = above.rpartition("/")[0]
        for both in groups & paths.keys():
            paths[f"{both}/{SELF}" if both else SELF] = paths.pop(both)
        self.groups = groups
        self.arrays = paths
        self._sorted = sorted(paths)

    def split_chunk_key(self, key: str) -> tuple[str, str] | None:
        """(path of an array, rest after ``path/c``) for the key of a chunk, else None."""
        at = len(key)
        while True:
            at = key.rfind("/c", 0, at)
            if at < 0:
                return None
            rest = key[at + 2 :]
            if key[:at] in self.arrays and (not rest or rest[0] == "/"):
                return key[:at], rest[1:]

    def children(self, group: str) -> Iterator[str]:
        """Names of the members of a group, sorted; nothing for a path that is no group."""
        if group not in self.groups:
            return
        prefix = f"{group}/" if group else ""
        position = bisect_left(self._sorted, prefix)
        while position < len(self._sorted) and self._sorted[position].startswith(prefix):
            child, slash, _ = self._sorted[position][len(prefix) :].partition("/")
            yield child
            # Everything below a subgroup sorts before the first character after the slash.
            position = bisect_left(self._sorted, f"{prefix}{child}0", position) if slash else position + 1

    def below(self, prefix: str) -> Iterator[str]:
        """Paths of arrays that begin with ``prefix``, sorted."""
        position = bisect_left(self._sorted, prefix)
        while position < len(self._sorted) and self._sorted[position].startswith(prefix):
            yield self._sorted[position]
            position += 1
