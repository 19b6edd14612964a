"""Which remote errors are worth another try, and the tries."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from ckptengine.errors import CheckpointError

T = TypeVar("T")
Kind = Literal["missing", "exists", "refused", "transient", "final"]

_TRANSIENT_ERRNO = frozenset(
    {errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}
)
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 509})
_TRANSIENT_CLASSES = frozenset(
    {"HTTPClientError", "ClientError", "ClientPayloadError", "ServerDisconnectedError", "ResponseParserError"}
)
_TRANSIENT_WORDS = ("timeout", "connection", "incompleteread", "disconnected")
_NETWORK_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "urllib3", "requests", "fsspec", "httpx", "azure", "google")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Up to ``attempts`` tries, each at most ``timeout_s`` long; pauses from ``first_s`` double up to ``most_s``."""

    attempts: int = 6
    first_s: float = 0.2
    most_s: float = 10.0
    timeout_s: float = 120.0

    def pauses_s(self) -> Iterator[float]:
        """The pauses between tries, spread by up to half so that ranks do not come back all at once."""
        pause = self.first_s
        for _ in range(self.attempts - 1):
            yield pause * random.uniform(0.5, 1.0)
            pause = min(pause * 2, self.most_s)


def kind_of(error: BaseException) -> Kind:
    """What an error of any file-system library means for the caller; unknown ones are final."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, FileExistsError):
        return "exists"
    if isinstance(error, PermissionError):
        return "refused"
    status = _status(error)
    if status is not None:
        by_status: dict[int, Kind] = {401: "refused", 403: "refused", 404: "missing", 412: "exists"}
        return "transient" if status in _TRANSIENT_STATUS else by_status.get(status, "final")
    if "credentials" in type(error).__name__.lower():
        return "refused"
    if isinstance(error, TimeoutError | ConnectionError | EOFError):
        return "transient"
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return "transient"
    return "transient" if any(_is_network_trouble(cls) for cls in type(error).__mro__) else "final"


def is_bucket_missing(error: BaseException) -> bool:
    """Whether it is not the object but what should contain it that does not exist."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("NoSuchBucket", "ContainerNotFound") or "bucket does not exist" in str(error).lower()


def _is_network_trouble(cls: type) -> bool:
    name = cls.__name__
    if cls.__module__.split(".")[0] not in _NETWORK_PACKAGES:
        return False
    return name in _TRANSIENT_CLASSES or any(word in name.lower() for word in _TRANSIENT_WORDS)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind ``error``, where the library tells."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int) and status >= 400:
                return status
        for attribute in ("status", "status_code", "code"):
            value = getattr(candidate, attribute, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


async def with_retry(retry: Retry, attempt: Callable[[int], Awaitable[T]]) -> T:
    """The first result of ``attempt(number of failures so far)``; the last error once retries are used up."""
    pauses = retry.pauses_s()
    failures = 0
    while True:
        try:
            async with asyncio.timeout(retry.timeout_s):
                return await attempt(failures)
        except CheckpointError:
            raise
        except Exception as error:
            pause = next(pauses, None) if kind_of(error) == "transient" else None
            if pause is None:
                raise
            failures += 1
        await asyncio.sleep(pause)
