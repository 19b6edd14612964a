"""Pickles written opcode by opcode, for the formats that consist of them.  Nothing of torch is imported to do so.

Protocol 2, as torch.save writes it, with nothing in it that ``torch.load(weights_only=True)`` refuses but numpy arrays.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.errors import UnsupportedValue

MAX_DEPTH = 200
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function returns when the pickle is loaded."""

    function: Global
    args: tuple[object, ...]


_IMMUTABLE = {
    Global("torch", "Size"),
    Global("torch.serialization", "_get_layout"),
    Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}
"""Functions of numbers and strings whose equal results may be one object."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An object made without its ``__init__``, with a state: its attributes, or what its ``__setstate__`` takes."""

    kind: Global
    state: object


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are records of this module."""

    items: Sequence[tuple[object, object]]


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of a torch.save file: ``nbytes`` bytes under ``data/<key>``; ``dtype`` None for an untyped one."""

    key: str
    dtype: str | None
    nbytes: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous tensor that is a whole storage."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_of(key: str, dtype: str, nbytes: int, itemsize: int) -> Storage:
    """The storage of a tensor: typed where torch has such a class, else untyped."""
    return Storage(key, dtype if dtype in _STORAGES else None, nbytes, itemsize)


def size(shape: Sequence[int]) -> Call:
    """A ``torch.Size``."""
    return _size(tuple(shape))


@functools.lru_cache(maxsize=4096)
def _size(shape: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def dumps(value: object, name: str = "value") -> bytes:
    """The pickle of plain values and of this module's records.

    Equal strings and globals are written once.  `UnsupportedValue` names the place of anything else.
    """
    emitter = _Emitter(name)
    emitter.value(value, 0)
    return b"\x80\x02" + b"".join(emitter.parts) + b"."


class _Emitter:
    def __init__(self, name: str) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[object, int] = {}
        self._where: list[object] = [name]

    def _place(self) -> str:
        """Where in the value this is, for errors: items of lists are numbers, keys of dicts in tuples."""
        text = str(self._where[0])
        for part in self._where[1:]:
            if not isinstance(part, tuple):
                text += f"[{part}]"
            elif isinstance(part[0], str | int):
                text += f".{part[0]}"
        return text

    def value(self, value: object, depth: int) -> None:
        """Append the opcodes that leave ``value`` on the stack."""
        if depth > MAX_DEPTH:
            raise UnsupportedValue(f"{self._place()}: nested deeper than {MAX_DEPTH} levels")
        emit = _SIMPLE.get(type(value))  # a checkpoint's metadata is millions of these
        if emit is not None:
            emit(self, value)
        elif isinstance(value, Instance):
            self._global(value.kind)
            self.parts.append(b")\x81")
            self.value(value.state, depth + 1)
            self.parts.append(b"b")
        elif isinstance(value, tuple):
            self._tuple(value, depth + 1)
        elif isinstance(value, dict):
            self._dict(list(value.items()), depth + 1)
        elif isinstance(value, Call):
            self._call(value, depth + 1)
        elif isinstance(value, list):
            self.parts.append(b"]")
            if value:
                self._marked(value, depth + 1)
                self.parts.append(b"e")
        else:
            self._rare(value, depth)

    def _rare(self, value: object, depth: int) -> None:
        if isinstance(value, bool | int | float | str):  # their subclasses
            kind = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))
            _SIMPLE[kind](self, value)
        elif isinstance(value, np.generic):
            self.value(value.item(), depth)
        elif isinstance(value, bytes | bytearray):
            self.value(Call(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")), depth)
        elif isinstance(value, Pairs):
            self._dict(value.items, depth + 1)
        elif isinstance(value, set | frozenset):
            self.value(Call(Global("__builtin__", "set"), (sorted(value, key=repr),)), depth + 1)
        elif isinstance(value, complex):
            self.value(Call(Global("__builtin__", "complex"), (value.real, value.imag)), depth + 1)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject and value.dtype.fields is None:
            little = value.astype(value.dtype.newbyteorder("<"))
            array = Call(Global("numpy", "ndarray"), (value.shape, little.dtype.str, little.tobytes()))
            self.value(array, depth + 1)
        elif isinstance(value, Tensor):
            self._tensor(value, depth + 1)
        else:
            raise UnsupportedValue(
                f"{self._place()}: a {type(value).__name__} has no form that torch.load(weights_only=True) accepts"
            )

    def _call(self, value: Call, depth: int) -> None:
        """What is called for something immutable is called once, and remembered like a string."""
        kept = value if value.function in _IMMUTABLE else None
        if kept is not None and self._recall(kept):
            return
        self._global(value.function)
        self._tuple(value.args, depth)
        self.parts.append(b"R")
        if kept is not None:
            self._remember(kept)

    def _marked(self, items: Sequence[object], depth: int) -> None:
        self.parts.append(b"(")
        for number, item in enumerate(items):
            self._where.append(number)
            self.value(item, depth)
            self._where.pop()

    def _tuple(self, items: tuple[object, ...], depth: int) -> None:
        if not items:
            self.parts.append(b")")
            return
        self._marked(items, depth)
        self.parts.append(b"t")

    def _dict(self, items: Sequence[tuple[object, object]], depth: int) -> None:
        self.parts.append(b"}")
        if not items:
            return
        self.parts.append(b"(")
        for key, item in items:
            self.value(key, depth)
            self._where.append((key,))
            self.value(item, depth)
            self._where.pop()
        self.parts.append(b"u")

    def _tensor(self, tensor: Tensor, depth: int) -> None:
        storage = tensor.storage
        kind = _STORAGES[storage.dtype] if storage.dtype else "UntypedStorage"
        typed = storage.dtype is not None
        count = storage.nbytes // storage.itemsize if typed else storage.nbytes
        self._global(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.parts.append(b"(")
        module = "torch" if typed else "torch.storage"
        self._tuple(("storage", Global(module, kind), storage.key, "cpu", count), depth)
        self.parts.append(b"Q")
        hooks = Call(Global("collections", "OrderedDict"), ())
        for item in (0, tensor.shape, tensor.strides, False, hooks):
            self.value(item, depth)
        if not typed:
            self._global(Global("torch", tensor.dtype))
        self.parts.append(b"tR")

    def _text(self, text: str) -> None:
        if self._recall(text):
            return
        data = text.encode("utf-8", "surrogatepass")
        self.parts.append(b"X" + struct.pack("<I", len(data)) + data)
        self._remember(text)

    def _global(self, value: Global) -> None:
        if not self._recall(value):
            self.parts.append(b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n")
            self._remember(value)

    def _recall(self, value: object) -> bool:
        number = self._memo.get(value)
        if number is not None:
            self.parts.append(b"h" + bytes((number,)) if number < 256 else b"j" + struct.pack("<I", number))
        return number is not None

    def _remember(self, value: object) -> None:
        number = self._memo[value] = len(self._memo)
        self.parts.append(b"q" + bytes((number,)) if number < 256 else b"r" + struct.pack("<I", number))


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    if len(data) < 256:
        return b"\x8a" + bytes((len(data),)) + data
    return b"\x8b" + struct.pack("<i", len(data)) + data


def _none(emitter: _Emitter, _: Any) -> None:
    emitter.parts.append(b"N")


def _boolean(emitter: _Emitter, value: bool) -> None:
    emitter.parts.append(b"\x88" if value else b"\x89")


def _whole(emitter: _Emitter, value: int) -> None:
    emitter.parts.append(_integer(value))


def _real(emitter: _Emitter, value: float) -> None:
    emitter.parts.append(b"G" + struct.pack(">d", value))


_SIMPLE: dict[type, Callable[[_Emitter, Any], None]] = {
    type(None): _none,
    bool: _boolean,
    int: _whole,
    float: _real,
    str: _Emitter._text,
    Global: _Emitter._global,
}
"""What appends the opcodes of values that hold no others."""
