"""`Tier`: how a user says where checkpoints rest, and the opening of the place that it names."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.policy.interval import Interval
from ckptengine.policy.keep import Keep
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.memory import MemoryTier
from ckptengine.tiers.port import TierPort
from ckptengine.tiers.redact import identity_of, is_url, redacted_url, split_url

_MEMORY_SCHEME = "shm"
_LOCAL_SCHEMES = ("file", "local")


@dataclass(frozen=True, slots=True, init=False)
class Tier:
    """A place where checkpoints rest on their way to the root, with its own interval and retention.

    ``path``: a directory (kept as an absolute path); ``shm://<name>`` for host memory that outlives the process; or
    any fsspec URL (``s3://bucket/run``). ``interval``: when a checkpoint goes there (None: whenever the checkpointer
    saves). ``keep``: what stays there (None: the newest one). ``options``: fsspec's storage options;
    ``max_bytes_per_s``: a cap on what is sent there. Credentials in ``path`` or ``options`` never appear in its repr.
    """

    path: str = field(repr=False)
    interval: Interval | None
    keep: Keep | None
    max_bytes_per_s: float | None
    options: Mapping[str, Any] = field(repr=False)
    label: str

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        interval: Interval | None = None,
        keep: Keep | None = None,
        max_bytes_per_s: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        text = os.fspath(path)
        if not isinstance(text, str) or not text:
            raise UnusableRequest(f"Tier({text!r}): the path of a tier is a directory or a URL")
        if interval is not None and not hasattr(interval, "due"):
            raise UnusableRequest(f"Tier(interval={interval!r}) must be ckptengine.Every(...) or AutoInterval(...)")
        if keep is not None and not isinstance(keep, Keep):
            raise UnusableRequest(f"Tier(keep={keep!r}) must be ckptengine.Keep(...)")
        if max_bytes_per_s is not None and not (math.isfinite(max_bytes_per_s) and max_bytes_per_s > 0):
            raise UnusableRequest(f"Tier(max_bytes_per_s={max_bytes_per_s!r}) must be above 0")
        set_field = object.__setattr__
        where = text if is_url(text) else str(Path(text).absolute())  # whatever becomes of the working directory
        set_field(self, "path", where)
        set_field(self, "interval", interval)
        set_field(self, "keep", keep)
        set_field(self, "max_bytes_per_s", max_bytes_per_s)
        set_field(self, "options", dict(options or {}))
        set_field(self, "label", redacted_url(text) if is_url(text) else text)

    @property
    def local_path(self) -> Path | None:
        """The directory, where the tier is one; None for memory and URLs."""
        protocol, bare, _ = split_url(self.path)
        if not is_url(self.path):
            return Path(self.path)
        return Path(bare.partition("://")[2]) if protocol in _LOCAL_SCHEMES else None

    @property
    def identity(self) -> str:
        """What tells this place from every other one, without credentials: labels of URLs leave some of it out."""
        return identity_of(self.path) if is_url(self.path) else self.path

    @property
    def is_memory(self) -> bool:
        """Whether it is host memory, where nothing is ever committed."""
        return split_url(self.path)[0] == _MEMORY_SCHEME


def open_tier(tier: Tier | str | os.PathLike[str], loop: IoLoop, *, writable: bool = True) -> TierPort:
    """The place behind ``tier``, to be used on ``loop``; created where it is a directory and ``writable``.

    Raises `UnusableRequest` for a URL nothing here can open, `StorageFailed` where the place refuses.
    """
    tier = tier if isinstance(tier, Tier) else Tier(tier)
    if tier.is_memory:
        return MemoryTier(split_url(tier.path)[1].partition("://")[2], create=writable)
    if tier.local_path is not None:
        return LocalTier(tier.local_path, create=writable)
    try:
        remote = importlib.import_module("ckptengine.tiers.remote")
    except ImportError as error:
        raise UnusableRequest(
            f"{tier.label} needs {error.name}, which is not installed: pip install 'ckptengine[remote]'"
        ) from None
    opening = remote.RemoteTier.open(tier.path, options=tier.options, writable=writable)
    opened: TierPort = loop.run(opening)
    return opened
