"""A look at a pickle before anything is built from it: where it ends, and that it asks for no more than it brings.

The standard unpickler trusts lengths and memo numbers: ten bytes can make it allocate gigabytes.  This scan walks the
opcodes (runs of fixed-size ones in one regular expression) and refuses what lies outside the data.
"""

from __future__ import annotations

import pickletools
import re
from functools import lru_cache

from ckptengine.errors import UnreadableFormat

_FIXED = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
_COUNTED = {  # argument -> bytes of its length
    "string1": 1,
    "bytes1": 1,
    "unicodestring1": 1,
    "long1": 1,
    "string4": 4,
    "bytes4": 4,
    "unicodestring4": 4,
    "long4": 4,
    "unicodestring8": 8,
    "bytes8": 8,
    "bytearray8": 8,
}
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_MEMO = {"LONG_BINPUT", "LONG_BINGET"}
_DIGITS = re.compile(rb"\d{1,10}\n")


def end_of_pickle(data: bytes, start: int = 0) -> int | None:
    """The position after the STOP of the pickle that begins at ``start``; None when ``data`` ends before it.

    Raises `UnreadableFormat` for unknown opcodes, memo numbers beyond the data, and opcodes whose meaning lies outside
    of the pickle (extension codes, out-of-band buffers).
    """
    size = len(data)
    highest = max(size, 255)
    runs = _runs((highest >> 16).bit_length())
    position = start
    while True:
        match = runs.match(data, position)
        position = match.end() if match else position
        if position >= size:
            return None
        code = data[position]
        if code == 0x2E:  # STOP
            return position + 1
        kind = _VARIABLE.get(code)
        if kind is None and code in _FIXED_CODES and size - position < _LONGEST:
            return None
        if kind is None:
            raise UnreadableFormat(f"byte {position} of a pickle is no opcode (0x{code:02x}); it is damaged")
        if kind > 0:
            length = int.from_bytes(data[position + 1 : position + 1 + kind], "little")
            position += 1 + kind + length
        elif kind == _LINE:
            position = _line_end(data, position)
        elif kind == _MEMO_NUMBER:
            end = _memo_end(data, position, highest)
            if end is None:
                return None
            position = end
        else:
            raise UnreadableFormat(f"byte {position} of a pickle refers to objects outside of it; it is refused")
        if position > size or position < 0:
            return None


_LINE, _MEMO_NUMBER, _OUTSIDE = -1, -2, -3


def _line_end(data: bytes, position: int) -> int:
    end = data.find(b"\n", position)
    return -1 if end < 0 else end + 1


def _memo_end(data: bytes, position: int, highest: int) -> int | None:
    """After a memo opcode whose number the run expression did not take: text, frames, or a number that is too high."""
    code = data[position]
    if code in b"pg":
        match = _DIGITS.match(data, position + 1)
        if match is None and len(data) - position > 12:
            raise UnreadableFormat(f"a pickle's memo number at byte {position} is no number")
        if match is None:
            return None
        number, end = int(match.group()), match.end()
    else:
        number, end = int.from_bytes(data[position + 1 : position + 5], "little"), position + 5
    if end > len(data):
        return None
    if number > highest:
        raise UnreadableFormat(f"a pickle of {len(data)} bytes claims {number} objects; it is damaged or hostile")
    return end


def _kind_of(code: pickletools.OpcodeInfo) -> int | None:
    """None: part of the run expression; above 0: bytes of a length that follows; else one of the constants above."""
    if code.name in _REFUSED:
        return _OUTSIDE
    if code.name in _MEMO or code.name in ("PUT", "GET"):
        return _MEMO_NUMBER
    if code.arg is None:
        return None
    if code.arg.name in _COUNTED:
        return _COUNTED[code.arg.name]
    if code.arg.name in _FIXED or code.name == "GLOBAL" or code.name == "INST":
        return None
    return _LINE


_FIXED_CODES = {ord(code.code) for code in pickletools.opcodes if _kind_of(code) is None}
_LONGEST = 2051  # a GLOBAL with two names of 1024 bytes
_VARIABLE = {ord(code.code): kind for code in pickletools.opcodes if (kind := _kind_of(code)) is not None}


@lru_cache(maxsize=8)
def _runs(high_bits: int) -> re.Pattern[bytes]:
    """Runs of opcodes of fixed size; memo numbers may use 16 bits and ``high_bits`` more."""
    by_size: dict[int, bytes] = {}
    for code in pickletools.opcodes:
        if ord(code.code) in _VARIABLE or code.name in ("STOP", "GLOBAL", "INST"):
            continue
        size = 0 if code.arg is None else _FIXED[code.arg.name]
        by_size[size] = by_size.get(size, b"") + re.escape(code.code.encode("latin-1"))
    parts = [b"[%s].{%d}" % (codes, size) for size, codes in by_size.items()]
    limit = 1 << high_bits
    low, high = min(limit, 256) - 1, max(limit >> 8, 1) - 1
    parts.append(b"[rj]..[\\x00-\\x%02x][\\x00-\\x%02x]" % (low, min(high, 255)))
    parts.append(b"[ci][^\\n]{0,1024}\\n[^\\n]{0,1024}\\n")
    return re.compile(b"(?:" + b"|".join(parts) + b")+", re.DOTALL)
