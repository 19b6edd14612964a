"""What the operating system's refusals become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptengine.errors import AlreadyExists, NotFound, StorageFailed
from ckptengine.store.files import storage_failed

_READING = ("read", "look at", "list")


@contextmanager
def refusals(action: str, where: str) -> Iterator[None]:
    """Turn every `OSError` inside into the project's own error."""
    try:
        yield
    except FileNotFoundError as refusal:
        if action in _READING:
            raise NotFound(f"cannot {action} {where}: it does not exist") from refusal
        raise StorageFailed(
            f"cannot {action} {where}: its directory is gone (ENOENT); was the disk unmounted? Bring it back, or use "
            f"another place"
        ) from refusal
    except FileExistsError as refusal:
        raise AlreadyExists(f"cannot {action} {where}: it exists already and is never overwritten") from refusal
    except OSError as refusal:
        raise storage_failed(action, where, refusal) from refusal
