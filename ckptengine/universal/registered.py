"""bfloat16 and float8 as data types of zarr-python, through ml_dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasItemSize
from zarr.core.dtype.wrapper import ZDType

from ckptengine.universal.datatypes import REGISTERED_TYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallFloat(ZDType[Any, Any], HasItemSize):
    """Base of the registered types; each subclass names one ml_dtypes type."""

    native: ClassVar[np.dtype[Any]]

    @property
    def item_size(self) -> int:
        return self.native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        if dtype != cls.native:
            raise DataTypeValidationError(f"{dtype} is not {cls.native}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        return self.native

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"{cls._zarr_v3_name} exists in zarr format 3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name or (isinstance(data, dict) and data.get("name") == cls._zarr_v3_name):
            return cls()
        raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")

    def to_json(self, zarr_format: int) -> Any:
        if zarr_format != 3:
            raise ValueError(f"{self._zarr_v3_name} exists in zarr format 3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.generic)

    def cast_scalar(self, data: Any) -> Any:
        if not self._check_scalar(data):
            raise TypeError(f"cannot make a {self._zarr_v3_name} of {data!r}")
        return self.native.type(float(data))

    def default_scalar(self) -> Any:
        return np.zeros((), np.dtype(f"u{self.item_size}")).view(self.native)[()]

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        if isinstance(data, str) and data.startswith("0x"):
            raw = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(raw, self.native)[0]
        named = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
        if isinstance(data, bool) or not (isinstance(data, int | float) or data in named):
            raise TypeError(f"invalid fill value {data!r} for {self._zarr_v3_name}")
        return self.native.type(named.get(data, data) if isinstance(data, str) else data)

    def to_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        value = np.asarray(data, self.native)
        number = float(value)
        if math.isfinite(number):
            return number
        return "0x" + value.tobytes()[::-1].hex()


def _make(name: str) -> type[SmallFloat]:
    native = np.dtype(getattr(ml_dtypes, name))
    body = {"native": native, "_zarr_v3_name": name, "dtype_cls": type(native), "__module__": __name__, "__slots__": ()}
    return type(name, (SmallFloat,), body)


TYPES: dict[str, type[SmallFloat]] = {name: _make(name) for name in sorted(REGISTERED_TYPES)}
"""The zarr data type classes by name."""


def register() -> None:
    """Make the types known to zarr-python in this process; doing it again changes nothing."""
    for name, kind in TYPES.items():
        if name not in data_type_registry.contents:
            data_type_registry.register(name, kind)
