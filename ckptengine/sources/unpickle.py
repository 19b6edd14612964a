"""A restricted unpickler: data comes out, nothing is ever run.

Globals resolve to functions and records of this module, or to an inert `Placeholder` class for everything else.  What
a pickle calls is one of those; a call on a placeholder is written down.  Tensors become `StoredTensor`, lazily.
"""

from __future__ import annotations

import collections
import datetime
import io
import math
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointError, Damaged, UnreadableFormat
from ckptengine.layout.dtypes import ITEMSIZE
from ckptengine.sources.pickle_scan import end_of_pickle
from ckptengine.sources.stored import Dtype, StoredArray, StoredStorage, StoredTensor

PersistentLoad = Callable[[object], object]
MAX_PICKLE_BYTES = 4 << 30


class Placeholder:
    """An object of a class that is not known here: what the pickle says about it, and no behaviour."""

    class_name = "?"

    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}  # noqa: RUF012  never changed in place
    state: object = None
    items: list[object] | None = None
    pairs: list[tuple[object, object]] | None = None

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        self = object.__new__(cls)
        if args:
            self.args = args
        if kwargs:
            self.kwargs = kwargs
        return self

    def __call__(self, *args: object) -> Placeholder:
        made = Placeholder(*args)
        made.class_name = f"{self.class_name}(...)"
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        if self.pairs is None:
            self.pairs = []
        self.pairs.append((key, value))

    def append(self, item: object) -> None:
        if self.items is None:
            self.items = []
        self.items.append(item)

    add = append

    def get(self, name: str, default: object = None) -> Any:
        """An attribute of the pickled object's state: its ``__dict__``, or its slots."""
        for part in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(part, dict) and name in part:
                return part[name]
        return default

    def __repr__(self) -> str:
        return f"<{self.class_name}, not loaded>"


class StorageType:
    """A storage class as persistent ids name it; ``dtype`` is None for untyped storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str | None) -> None:
        self.dtype = dtype


class _NumpyDtype:
    """A numpy dtype under construction."""

    def __init__(self, text: object = "V", align: object = False, copy: object = False) -> None:
        self._text = str(text)
        self._order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self._order = state[1]

    def resolve(self) -> np.dtype:
        try:
            dtype = np.dtype(self._text)
        except (TypeError, ValueError):
            raise UnreadableFormat(f"unknown numpy element type {self._text!r}") from None
        if dtype.hasobject or dtype.fields is not None:
            raise UnreadableFormat(f"numpy arrays of {self._text!r} cannot be read without running code")
        if self._text[:1] in "<>|=":
            return dtype
        return dtype.newbyteorder("<" if self._order == "=" else self._order)  # type: ignore[arg-type]


class NumpyArray:
    """A numpy array under construction; `array` gives it once the pickle is read."""

    def __init__(self, *args: object) -> None:
        self._state: tuple[Any, ...] = (1, (0,), None, False, b"")
        if len(args) == 3 and isinstance(args[1], str) and isinstance(args[2], bytes):  # shape, dtype, buffer
            self._state = (1, args[0], _NumpyDtype(args[1]), False, args[2])

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnreadableFormat("a numpy array in a pickle has a state that is not known")
        self._state = state

    def array(self) -> StoredArray:
        _, shape, dtype, fortran, data = self._state
        if dtype is None:
            return StoredArray(b"", np.dtype("u1"), (0,))
        if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise UnreadableFormat("a numpy array in a pickle holds objects; it cannot be read without running code")
        return StoredArray(data, dtype.resolve(), shape, bool(fortran))


def loads(data: bytes, persistent_load: PersistentLoad | None = None, what: str = "a pickle") -> Any:
    """The object of one pickle.

    ``what`` names the file in errors.  Raises `Damaged` for a pickle that is cut off or does not parse, and
    `UnreadableFormat` for one that asks for what is never done here.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise UnreadableFormat(f"the pickle of {what} has {len(data)} bytes; {MAX_PICKLE_BYTES} is the most read")
    try:
        if end_of_pickle(data) is None:
            raise Damaged(f"the pickle of {what} is cut off after {len(data)} bytes")
        return _Unpickler(data, persistent_load).load()
    except CheckpointError as error:
        if what in str(error):
            raise
        raise type(error)(f"{what}: {error}") from error
    except (Exception, MemoryError) as error:  # a damaged pickle can make the unpickler raise nearly anything
        raise Damaged(f"the pickle of {what} does not parse: {type(error).__name__}: {error}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, persistent: PersistentLoad | None) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
        self._persistent = persistent
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        known = _KNOWN.get(key) or self._classes.get(key)
        if known is None:
            known = self._classes[key] = type("Placeholder", (Placeholder,), {"class_name": f"{module}.{name}"})
        return known

    def persistent_load(self, pid: object) -> object:
        if self._persistent is None:
            raise UnreadableFormat("a pickle refers to storages, but it is not part of a torch file")
        return self._persistent(pid)


def unknown_storage(pid: Any) -> Placeholder:
    """A storage of a class that is not known (quantized tensors have such): only what uses it cannot be read."""
    made = Placeholder(pid)
    made.class_name = getattr(pid[1], "class_name", "an unknown storage")
    return made


def _tensor(storage: object, start: Any, shape: Any, strides: Any, grad: object = False, hooks: object = None,
            metadata: object = None, *rest: object) -> object:  # fmt: skip
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if isinstance(storage, Placeholder):
        return _unread("torch.Tensor of " + storage.class_name, storage)
    if not isinstance(storage, StoredStorage) or storage.dtype is None:
        raise UnreadableFormat("a tensor in a pickle does not lie in a typed storage")
    return _viewed(StoredTensor(storage, storage.dtype, start, tuple(shape), tuple(strides)), metadata)


def _tensor_v3(storage: object, start: Any, shape: Any, strides: Any, grad: object, hooks: object, dtype: object,
               metadata: object = None, *rest: object) -> object:  # fmt: skip
    """torch._utils._rebuild_tensor_v3: untyped storage, explicit dtype."""
    if not isinstance(storage, StoredStorage) or not isinstance(dtype, Dtype):
        return _unread(f"torch.Tensor of {getattr(dtype, 'class_name', dtype)}", storage)
    return _viewed(StoredTensor(storage, str(dtype), start, tuple(shape), tuple(strides)), metadata)


def _viewed(tensor: StoredTensor, metadata: object) -> object:
    """The tensor, unless its bytes are those of its conjugate or negative."""
    lazy = [name for name in ("conj", "neg") if metadata.get(name)] if isinstance(metadata, dict) else []
    return _unread(f"torch.Tensor as a lazy view ({lazy[0]})", tensor) if lazy else tensor


def _unread(class_name: str, *args: object) -> Placeholder:
    """A tensor whose elements are not simply its bytes."""
    made = Placeholder(*args)
    made.class_name = class_name
    return made


def _first(first: object, *rest: object) -> object:
    """torch._utils._rebuild_parameter and relatives: the tensor itself."""
    return first


def _from_type(function: object, new_type: object, args: object, state: object) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass of Tensor."""
    if function in _TENSOR_BUILDERS and isinstance(args, tuple):
        return function(*args)  # type: ignore[operator]
    return _unread(f"torch.Tensor of class {getattr(new_type, 'class_name', '?')}", args, state)


def _array_tensor(array: object, dtype: object, *rest: object) -> object:
    """torch._utils._rebuild_device_tensor_from_numpy: bytes by value."""
    return _unread("torch.Tensor of numpy", array, dtype)


def _reconstruct(cls: Any, base: object, state: object) -> object:
    """copyreg._reconstructor, of protocols below 2."""
    made = cls() if isinstance(cls, type) and issubclass(cls, Placeholder) else Placeholder(cls)
    if state is not None:
        made.args = (state,)
    return made


_INT = {int}


def _size(items: Any = ()) -> tuple[int, ...]:
    shape = tuple(items)
    if not _INT.issuperset(map(type, shape)):
        raise UnreadableFormat(f"a size of {shape!r} in a pickle")
    return shape


def _device(*args: object) -> str:
    return ":".join(str(arg) for arg in args)


def _encode(text: str, encoding: str = "latin1", *rest: object) -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise UnreadableFormat(f"a text encoding {encoding!r} in a pickle")
    return text.encode(encoding)


def _scalar(dtype: object, data: object = b"") -> object:
    """numpy.core.multiarray.scalar."""
    if not isinstance(dtype, _NumpyDtype):
        raise UnreadableFormat("a numpy scalar in a pickle has no element type")
    kind = dtype.resolve()
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise Damaged(f"a numpy scalar of {kind} does not have {kind.itemsize} bytes")
    return np.frombuffer(data, kind)[0]


def _from_buffer(data: object, dtype: object, shape: Any, order: object) -> object:
    """numpy.core.numeric._frombuffer, of protocol 5."""
    made = NumpyArray()
    made.__setstate__((1, tuple(shape), dtype, order == "F", bytes(data)))  # type: ignore[call-overload]
    return made


def _copying(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """A container class that copies what is there already and never counts, expands or multiplies."""

    def make(*args: Any) -> Any:
        if not all(isinstance(arg, list | tuple | set | frozenset | dict | bytes) for arg in args) or len(args) > 1:
            raise UnreadableFormat(f"a pickle makes a container from {args!r:.100}; it is refused")
        return kind(*args)

    return make


def _defaultdict(factory: object = None, items: Any = ()) -> dict[Any, Any]:
    return collections.defaultdict(None, items)


def _deque(items: Any = (), maxlen: object = None) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _bytearray(data: Any = b"", encoding: object = None) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else _copying(bytes)(data)


def _number(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if not all(isinstance(arg, int | float | str) and len(str(arg)) < 4000 for arg in args):
            raise UnreadableFormat(f"a pickle makes a number from {args!r:.100}; it is refused")
        return kind(*args)

    return make


def _range(*args: int) -> Placeholder | list[int]:
    numbers = range(*args)
    return list(numbers) if len(numbers) <= 1 << 16 else Placeholder(*args)


def _path(*parts: str) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(*parts)


def _numpy_names() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {("numpy", "dtype"): _NumpyDtype, ("numpy", "ndarray"): NumpyArray}
    for package in ("numpy.core", "numpy._core"):
        known[package + ".multiarray", "_reconstruct"] = NumpyArray
        known[package + ".multiarray", "scalar"] = _scalar
        known[package + ".numeric", "_frombuffer"] = _from_buffer
    return known


def _torch_names() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {("torch", name): Dtype(name) for name in ITEMSIZE}
    storages = {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": None,
    }  # fmt: skip
    for module in ("torch", "torch.cuda", "torch.storage"):
        known |= {(module, f"{name}Storage"): StorageType(dtype) for name, dtype in storages.items()}
    utils = "torch._utils"
    known |= {
        (utils, "_rebuild_tensor"): _tensor,
        (utils, "_rebuild_tensor_v2"): _tensor,
        (utils, "_rebuild_tensor_v3"): _tensor_v3,
        (utils, "_rebuild_parameter"): _first,
        (utils, "_rebuild_parameter_with_state"): _first,
        ("torch.nn.parameter", "Parameter"): _first,
        ("torch.nn.parameter", "Buffer"): _first,
        ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
        (utils, "_rebuild_device_tensor_from_numpy"): _array_tensor,
        ("torch", "Size"): _size,
        ("torch", "device"): _device,
        ("torch.serialization", "_get_layout"): str,
    }
    return known


def _python_names() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _copying(collections.OrderedDict),
        ("collections", "defaultdict"): _defaultdict,
        ("collections", "Counter"): _copying(dict),
        ("collections", "deque"): _deque,
        ("_codecs", "encode"): _encode,
        ("copyreg", "_reconstructor"): _reconstruct,
        ("copy_reg", "_reconstructor"): _reconstruct,
        ("math", "inf"): math.inf,
        ("datetime", "timedelta"): _number(datetime.timedelta),
    }
    for module in ("builtins", "__builtin__"):
        known |= {(module, kind.__name__): _copying(kind) for kind in (list, tuple, dict, set, frozenset, bytes)}
        known |= {(module, kind.__name__): _number(kind) for kind in (int, float, complex, bool)}
        known |= {(module, "bytearray"): _bytearray, (module, "range"): _range, (module, "xrange"): _range}
    for module in ("pathlib", "pathlib._local"):
        names = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        known |= {(module, name): _path for name in names}
    return known


_TENSOR_BUILDERS: frozenset[object] = frozenset((_tensor, _tensor_v3, _first))
_KNOWN = _python_names() | _numpy_names() | _torch_names()
