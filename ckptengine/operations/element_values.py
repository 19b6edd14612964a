"""Elements of any type as numbers, for differences that are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SMALL_FLOATS: dict[str, tuple[int, int, int, bool, bool]] = {
    # exponent bits, mantissa bits, bias, has infinity, "fnuz": the only NaN is what would be -0
    "float8_e4m3fn": (4, 3, 7, False, False),
    "float8_e4m3fnuz": (4, 3, 8, False, True),
    "float8_e5m2": (5, 2, 15, True, False),
    "float8_e5m2fnuz": (5, 2, 16, False, True),
}


def as_numbers(units: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """float64 values of elements given as opaque units of their size.

    Complex numbers are given by their magnitude, 64-bit integers rounded, packed 4-bit floats as their bytes.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN is only a NaN here
        return _as_numbers(np.ascontiguousarray(units), dtype)


def _as_numbers(flat: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "bfloat16":
        widened = np.zeros((flat.size, 2), np.uint16)  # the lower half of a float32 is zero
        widened[:, 1] = flat.view(np.uint16)
        return widened.view("<f4")[:, 0].astype(np.float64)
    if dtype in _SMALL_FLOATS:
        return _table(dtype)[flat.view(np.uint8)]
    if dtype == "float8_e8m0fnu":
        exponents = flat.view(np.uint8).astype(np.float64)
        return np.where(exponents == 255, np.nan, np.exp2(exponents - 127))
    if dtype == "complex32":
        halves = flat.view(np.float16).reshape(-1, 2).astype(np.float64)
        return np.hypot(halves[:, 0], halves[:, 1])
    if dtype.startswith("complex"):
        magnitudes: npt.NDArray[Any] = np.abs(flat.view(dtype))
        return magnitudes.astype(np.float64)
    if dtype == "float4_e2m1fn_x2":
        return flat.view(np.uint8).astype(np.float64)
    return flat.view(np.uint8 if dtype == "bool" else dtype).astype(np.float64)


def _table(dtype: str) -> npt.NDArray[np.float64]:
    """The values of all 256 codes."""
    exponent_bits, mantissa_bits, bias, has_infinity, single_nan = _SMALL_FLOATS[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent == 0, np.exp2(1.0 - bias) * mantissa, np.exp2(exponent - float(bias)) * (1 + mantissa))
    values = np.where(codes >= 128, -values, values)
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity:
        values = np.where(top, np.where(mantissa == 0, np.copysign(np.inf, values), np.nan), values)
    elif single_nan:
        values = np.where(codes == 128, np.nan, values)
    else:
        values = np.where((codes & 127) == 127, np.nan, values)
    return values
