"""Pickles written opcode by opcode, for the formats that consist of them.  Nothing of torch is imported to do so.

Protocol 2, as torch.save writes it, with nothing in it that ``torch.load(weights_only=True)`` refuses but numpy arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

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
    return Call(Global("torch", "Size"), (tuple(shape),))


def dumps(value: object, name: str = "value") -> bytes:
    """The pickle of plain values and of this module's records.

    Equal strings and globals are written once.  `UnsupportedValue` names the place of anything else.
    """
    emitter = _Emitter()
    emitter.value(value, name, 0)
    return b"\x80\x02" + b"".join(emitter.parts) + b"."


class _Emitter:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[object, int] = {}

    def value(self, value: object, name: str, depth: int) -> None:
        """Append the opcodes that leave ``value`` on the stack."""
        if depth > MAX_DEPTH:
            raise UnsupportedValue(f"{name}: nested deeper than {MAX_DEPTH} levels")
        if value is None or isinstance(value, bool):
            self.parts.append(b"N" if value is None else b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self.parts.append(_integer(value))
        elif isinstance(value, float):
            self.parts.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self._text(value)
        elif isinstance(value, np.generic):
            self.value(value.item(), name, depth)
        elif isinstance(value, bytes | bytearray):
            self.value(Call(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")), name, depth)
        elif isinstance(value, Global):
            self._global(value)
        else:
            self._compound(value, name, depth + 1)

    def _compound(self, value: object, name: str, depth: int) -> None:
        if isinstance(value, dict):
            self._dict(list(value.items()), name, depth)
        elif isinstance(value, Pairs):
            self._dict(value.items, name, depth)
        elif isinstance(value, list):
            self.parts.append(b"]")
            if value:
                self._marked(value, name, depth)
                self.parts.append(b"e")
        elif isinstance(value, tuple):
            self._tuple(value, name, depth)
        elif isinstance(value, set | frozenset):
            self.value(Call(Global("__builtin__", "set"), (sorted(value, key=repr),)), name, depth)
        elif isinstance(value, complex):
            self.value(Call(Global("__builtin__", "complex"), (value.real, value.imag)), name, depth)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject and value.dtype.fields is None:
            little = value.astype(value.dtype.newbyteorder("<"))
            array = Call(Global("numpy", "ndarray"), (value.shape, little.dtype.str, little.tobytes()))
            self.value(array, name, depth)
        elif isinstance(value, Call):
            self._global(value.function)
            self._tuple(value.args, name, depth)
            self.parts.append(b"R")
        elif isinstance(value, Instance):
            self._global(value.kind)
            self.parts.append(b")\x81")
            self.value(value.state, name, depth)
            self.parts.append(b"b")
        elif isinstance(value, Tensor):
            self._tensor(value, name, depth)
        else:
            raise UnsupportedValue(
                f"{name}: a {type(value).__name__} has no form that torch.load(weights_only=True) accepts"
            )

    def _marked(self, items: Sequence[object], name: str, depth: int) -> None:
        self.parts.append(b"(")
        for number, item in enumerate(items):
            self.value(item, f"{name}[{number}]", depth)

    def _tuple(self, items: tuple[object, ...], name: str, depth: int) -> None:
        if not items:
            self.parts.append(b")")
            return
        self._marked(items, name, depth)
        self.parts.append(b"t")

    def _dict(self, items: Sequence[tuple[object, object]], name: str, depth: int) -> None:
        self.parts.append(b"}")
        if not items:
            return
        self.parts.append(b"(")
        for key, item in items:
            self.value(key, name, depth)
            self.value(item, f"{name}.{key}" if isinstance(key, str | int) else name, depth)
        self.parts.append(b"u")

    def _tensor(self, tensor: Tensor, name: str, depth: int) -> None:
        storage = tensor.storage
        kind = _STORAGES[storage.dtype] if storage.dtype else "UntypedStorage"
        typed = storage.dtype is not None
        count = storage.nbytes // storage.itemsize if typed else storage.nbytes
        self._global(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.parts.append(b"(")
        module = "torch" if typed else "torch.storage"
        self._tuple(("storage", Global(module, kind), storage.key, "cpu", count), name, depth)
        self.parts.append(b"Q")
        hooks = Call(Global("collections", "OrderedDict"), ())
        for item in (0, tensor.shape, tensor.strides, False, hooks):
            self.value(item, name, depth)
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
