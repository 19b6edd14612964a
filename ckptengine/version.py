"""The package's version, read once from its metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

try:
    version = _version("ckptengine")
except PackageNotFoundError:  # running from a source tree that is not installed
    version = "0+source"
