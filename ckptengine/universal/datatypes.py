"""Element types as zarr v3 data types: zarr's own where it has one, else integers or a registered type.

zarr knows no bfloat16, float8 or complex32.  As *integers* of the same size they are readable by every implementation,
with the true type in the array's attributes; as *registered* types they are what they are, for readers that know the
extension (our own view, tensorstore).  Types without a registered form stay integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptengine.errors import UnreadableFormat
from ckptengine.layout.dtypes import ITEMSIZE, itemsize

_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
ZARR_TYPES = frozenset({"bool", *_INTEGERS, "float16", "float32", "float64", "complex64", "complex128"})
"""Types that zarr v3 has itself, by the same names."""

REGISTERED_TYPES = frozenset(
    {"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}
)
"""Types of the public registry of zarr extensions that ml_dtypes gives to numpy."""


@dataclass(frozen=True, slots=True)
class StoredType:
    """How elements are declared in an array's metadata: the data type, its fill value and its size."""

    name: str
    fill_value: object
    item_bytes: int


def stored_type(dtype: str, registered: bool) -> StoredType:
    """The zarr data type for elements of ``dtype``; integers for what zarr lacks unless ``registered``."""
    size = itemsize(dtype)
    if dtype in ZARR_TYPES:
        fill: object = False if dtype == "bool" else [0.0, 0.0] if dtype.startswith("complex") else 0
        return StoredType(dtype, 0.0 if dtype.startswith("float") else fill, size)
    if registered and dtype in REGISTERED_TYPES:
        return StoredType(dtype, "0x00" if dtype == "float8_e8m0fnu" else 0.0, size)
    return StoredType(f"uint{8 * size}", 0, size)


def true_type(declared: object, attribute: object, where: str) -> str:
    """The element type of a stored array: its attribute where that has the declared type's size, else the declared.

    Raises `UnreadableFormat` for a type that is not known.
    """
    name = declared
    if isinstance(attribute, str) and attribute in ITEMSIZE:
        name = attribute
    if not isinstance(name, str) or name not in ITEMSIZE:
        raise UnreadableFormat(f"{where}: data type {declared!r} is not one that a tensor can have")
    if isinstance(declared, str) and declared in ITEMSIZE and ITEMSIZE[declared] != ITEMSIZE[name]:
        raise UnreadableFormat(f"{where}: data type {declared!r} and attribute {attribute!r} differ in size")
    return name
