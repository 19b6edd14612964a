"""Typed encoding of the standard library's, numpy's and torch's small types, random generators included."""

from __future__ import annotations

import datetime
import decimal
import fractions
import io
import pathlib
import random
import uuid
from typing import Any

import numpy as np
import torch

from ckptengine.errors import UnsupportedValue
from ckptengine.state.decoding import DECODERS, Decoder, checked, malformed, unb64
from ckptengine.state.dtypes import ALL_DTYPES
from ckptengine.state.encoding import ENCODERS, Encoder, Json, b64, where

INLINE_ARRAY_BYTES = 4096
"""A numpy array up to this size is part of the values; a larger one is stored like a tensor."""

_ARRAY_KINDS = "biufcSUmM"
_PATHS: dict[str, type[pathlib.PurePath]] = {
    "PosixPath": pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
_BIT_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    kind.__name__: kind
    for kind in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}


def array_dtype(array: np.ndarray[Any, Any] | np.generic, name: str) -> str:
    """The stored dtype string of an array; `UnsupportedValue` for object and structured arrays."""
    dtype = array.dtype
    if dtype.kind not in _ARRAY_KINDS or dtype.hasobject or dtype.names:
        raise UnsupportedValue(
            f"{where(name)} is a numpy value of dtype {dtype}, which has no typed encoding; "
            f"store its columns or elements as plain arrays"
        )
    return dtype.str


def read_dtype(text: Json) -> np.dtype[Any]:
    """A numpy dtype from its stored string; only plain ones."""
    dtype: np.dtype[Any] = np.dtype(checked(text, str))
    if dtype.kind not in _ARRAY_KINDS or dtype.hasobject or dtype.names or dtype.subdtype:
        raise malformed(f"numpy dtype {text!r}")
    return dtype


def read_shape(data: Json) -> tuple[int, ...]:
    shape = tuple(checked(extent, int) for extent in checked(data, list))
    if len(shape) > 64 or any(extent < 0 for extent in shape):
        raise malformed(f"array shape {shape}")
    return shape


def encode_array(array: np.ndarray[Any, Any], name: str) -> dict[str, Json]:
    """A whole array, bytes included."""
    dtype = array_dtype(array, name)
    data = np.ascontiguousarray(array).tobytes()
    return {"$": "ndarray", "dtype": dtype, "shape": list(array.shape), "v": b64(data)}


def _ndarray(encoder: Encoder, array: np.ndarray[Any, Any], name: str) -> Json:
    if array.nbytes > INLINE_ARRAY_BYTES and encoder.leaf is not None:
        array_dtype(array, name)
        found = encoder.leaf(array, name)
        if found is not NotImplemented:
            return found  # type: ignore[no-any-return]
    return encode_array(array, name)


def _read_ndarray(decoder: Decoder, node: dict[str, Json]) -> object:
    dtype, shape = read_dtype(node["dtype"]), read_shape(node["shape"])
    if "tensor" in node:
        if decoder.leaf is not None:
            return decoder.leaf(node, decoder)
        return decoder.decode({"$": "tensor", "name": node["tensor"]})
    return np.frombuffer(unb64(node["v"]), dtype).reshape(shape).copy()


def _numpy_scalar(_: Encoder, value: np.generic, name: str) -> Json:
    return {"$": "numpy", "dtype": array_dtype(value, name), "v": b64(value.tobytes()[: value.dtype.itemsize])}


def _read_numpy_scalar(_: Decoder, node: dict[str, Json]) -> object:
    dtype, data = read_dtype(node["dtype"]), unb64(node["v"])
    if dtype.itemsize == 0 and not data:
        return dtype.type()
    if len(data) != dtype.itemsize:
        raise malformed(f"{len(data)} bytes for a numpy {dtype}")
    return np.frombuffer(data, dtype)[0]


def _path(encoder: Encoder, value: pathlib.PurePath, name: str) -> Json:
    return {"$": "path", "kind": type(value).__name__, "v": encoder.encode(str(value), name)}


def _read_path(decoder: Decoder, node: dict[str, Json]) -> object:
    text, kind = checked(decoder.decode(node["v"]), str), _PATHS[checked(node["kind"], str)]
    try:
        return kind(text)
    except NotImplementedError:  # the other system's concrete path: keep what can be kept
        return _PATHS["Pure" + kind.__name__](text)


def _torch_dtype(_: Encoder, value: torch.dtype, name: str) -> Json:
    return {"$": "torch.dtype", "v": str(value).removeprefix("torch.")}


def _tuple_of_ints(decoder: Decoder, data: Json) -> tuple[int, ...]:
    return tuple(checked(part, int) for part in decoder.sequence(data))


def encode_python_state(state: tuple[Any, ...]) -> Json:
    """`random.getstate()`: its 625 words packed."""
    version, words, gauss = state
    return {"version": version, "words": b64(np.asarray(words, "<u4").tobytes()), "gauss": gauss}


def read_python_state(data: Json) -> tuple[Any, ...]:
    node = checked(data, dict)
    words = tuple(int(word) for word in np.frombuffer(unb64(node["words"]), "<u4"))
    gauss = node["gauss"]
    if node["version"] != 3 or len(words) != 625 or not (gauss is None or type(gauss) is float):
        raise malformed("state of Python's random generator")
    return 3, words, gauss


def _python_random(_: Encoder, value: random.Random, name: str) -> Json:
    return {"$": "random.Random", "v": encode_python_state(value.getstate())}


def _read_python_random(_: Decoder, node: dict[str, Json]) -> object:
    generator = random.Random()
    generator.setstate(read_python_state(node["v"]))
    return generator


def _torch_generator(_: Encoder, value: torch.Generator, name: str) -> Json:
    return {"$": "torch.Generator", "device": str(value.device), "v": encode_torch_state(value.get_state())}


def encode_torch_state(state: torch.Tensor) -> Json:
    return b64(state.cpu().numpy().tobytes())


def read_torch_state(data: Json) -> torch.Tensor:
    return torch.frombuffer(bytearray(unb64(data) or b"\0"), dtype=torch.uint8)


def _read_torch_generator(_: Decoder, node: dict[str, Json]) -> object:
    try:
        generator = torch.Generator(device=checked(node["device"], str))
        generator.set_state(read_torch_state(node["v"]))
    except RuntimeError as error:
        raise malformed(f"state of a torch generator: {error}") from error
    return generator


def _numpy_generator(encoder: Encoder, value: np.random.Generator | np.random.RandomState, name: str) -> Json:
    if isinstance(value, np.random.Generator):
        state: Any = value.bit_generator.state
        if type(value.bit_generator).__name__ not in _BIT_GENERATORS:
            raise UnsupportedValue(f"{where(name)}: no encoding for the bit generator {type(value.bit_generator)}")
    else:
        state = value.get_state(legacy=False)
    return {"$": "numpy.random", "kind": type(value).__name__, "v": encoder.plain(state, name)}


def set_numpy_generator(value: np.random.Generator | np.random.RandomState, state: Any) -> None:
    """Put a decoded state into a numpy generator; malformed ones raise `UnreadableFormat`."""
    try:
        if isinstance(value, np.random.Generator):
            value.bit_generator.state = state
        else:
            value.set_state(state)
    except (TypeError, ValueError, KeyError) as error:
        raise malformed(f"state of a numpy generator: {error}") from error


def _read_numpy_generator(decoder: Decoder, node: dict[str, Json]) -> object:
    state = checked(decoder.decode(node["v"]), dict)
    bits = _BIT_GENERATORS[checked(state["bit_generator"], str)]()
    generator = np.random.Generator(bits) if node["kind"] == "Generator" else np.random.RandomState()
    set_numpy_generator(generator, state)
    return generator


def _timedelta(encoder: Encoder, value: datetime.timedelta, name: str) -> Json:
    return {"$": "timedelta", "v": [value.days, value.seconds, value.microseconds]}


def _datetime(_: Encoder, value: datetime.datetime, name: str) -> Json:
    if value.tzinfo is not None and not isinstance(value.tzinfo, datetime.timezone):
        raise UnsupportedValue(f"{where(name)}: only fixed-offset time zones have an encoding; use astimezone(UTC)")
    return {"$": "datetime", "v": value.isoformat(), "fold": value.fold}


def _read_datetime(text: str, fold: int) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(fold=fold)


def _size(_: Encoder, value: torch.Size, name: str) -> Json:
    return {"$": "torch.Size", "v": [int(extent) for extent in value]}


ENCODERS |= {
    torch.Size: _size,
    torch.dtype: _torch_dtype,
    torch.device: lambda e, v, name: {"$": "torch.device", "v": str(v)},
    torch.Generator: _torch_generator,
    np.ndarray: _ndarray,
    random.Random: _python_random,
    np.random.Generator: _numpy_generator,
    np.random.RandomState: _numpy_generator,
    datetime.timedelta: _timedelta,
    datetime.datetime: _datetime,
    datetime.date: lambda e, v, name: {"$": "date", "v": v.isoformat()},
    uuid.UUID: lambda e, v, name: {"$": "uuid", "v": v.hex},
    decimal.Decimal: lambda e, v, name: {"$": "decimal", "v": str(v)},
    fractions.Fraction: lambda e, v, name: {"$": "fraction", "v": [e.encode(v.numerator), e.encode(v.denominator)]},
    io.BytesIO: lambda e, v, name: {"$": "BytesIO", "v": b64(v.getvalue())},
}
ENCODERS |= dict.fromkeys(_PATHS.values(), _path)
ENCODERS |= {kind: _numpy_scalar for kind in np.sctypeDict.values() if np.dtype(kind).kind in _ARRAY_KINDS}

DECODERS |= {
    "torch.Size": lambda d, n: torch.Size(_tuple_of_ints(d, n["v"])),
    "torch.dtype": lambda d, n: ALL_DTYPES[checked(n["v"], str)],
    "torch.device": lambda d, n: _read_device(checked(n["v"], str)),
    "torch.Generator": _read_torch_generator,
    "ndarray": _read_ndarray,
    "numpy": _read_numpy_scalar,
    "path": _read_path,
    "random.Random": _read_python_random,
    "numpy.random": _read_numpy_generator,
    "timedelta": lambda d, n: datetime.timedelta(*_tuple_of_ints(d, n["v"])),
    "datetime": lambda d, n: _read_datetime(checked(n["v"], str), checked(n["fold"], int)),
    "date": lambda d, n: datetime.date.fromisoformat(checked(n["v"], str)),
    "uuid": lambda d, n: uuid.UUID(hex=checked(n["v"], str)),
    "decimal": lambda d, n: decimal.Decimal(checked(n["v"], str)),
    "fraction": lambda d, n: fractions.Fraction(*_tuple_of_ints(d, n["v"])),
    "BytesIO": lambda d, n: io.BytesIO(unb64(n["v"])),
}


def _read_device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise malformed(f"device {text!r}: {error}") from error
