"""A place behind an fsspec URL as a tier: object stores, and whatever else fsspec reaches.

S3 is spoken on the caller's loop; every other file system runs in its threads.  What an endpoint honours is found
out when the tier is opened, by trying.  Transient errors are tried again within bounds; every other error, and the last
transient one, becomes one of `ckptengine.errors` whose text holds no credential.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar, cast

import fsspec

from ckptengine.errors import AlreadyExists, CheckpointError, NotFound, StorageFailed, Truncated, UnusableRequest
from ckptengine.tiers.port import PARTIAL, Abilities, Bytes, Entry, Spare, Upload, check_name, check_range, nothing
from ckptengine.tiers.redact import Scrubber, for_fsspec, redacted_url, secrets_in, secrets_of
from ckptengine.tiers.retry import Retry, is_bucket_missing, kind_of, with_retry
from ckptengine.tiers.stream import StreamUpload

T = TypeVar("T")

_WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2"})
"""Protocols under which an object appears whole or not at all; under others a temporary name is moved into place."""
_FORGETS = frozenset({"memory"})
_PATTERN = frozenset("*?[")


class RemoteTier:
    """Objects under an fsspec URL; open it with `RemoteTier.open` on the loop that will use it."""

    def __init__(self, url: str, fs: Any, base: str, abilities: Abilities, retry: Retry, scrubber: Scrubber) -> None:
        self.fs = fs
        self._label = redacted_url(url)
        self._base = base.rstrip("/")
        self._abilities = abilities
        self._retry = retry
        self._scrubber = scrubber
        self._create_lock = asyncio.Lock()
        self._awaits = speaks_s3(fs)
        self.checks_payload = False
        self._publishes_whole = not _protocols(fs).isdisjoint(_WHOLE_OBJECTS)

    def __repr__(self) -> str:
        return f"RemoteTier({self._label!r})"

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
        writable: bool = True,
    ) -> RemoteTier:
        """Connect to ``url`` with fsspec's storage ``options``, and find out what is honoured there.

        Nothing is written unless ``writable``.  Raises `UnusableRequest` for a URL that no installed file system
        speaks, `StorageFailed` for one that cannot be reached, refuses the credentials or has no such bucket.
        """
        retry = retry or Retry()
        bare, carried = for_fsspec(url)
        chosen = carried | dict(options or {})
        scrubber = Scrubber(secrets_in(chosen, *secrets_of(url)))
        fs, base = _connect(bare, chosen, retry, scrubber, redacted_url(url))
        abilities = Abilities(
            atomic_rename=False,
            conditional_put=False,
            append=False,
            ranged_read=True,
            resumable_parts=speaks_s3(fs),
            survives_process=_protocols(fs).isdisjoint(_FORGETS),
            survives_power_cut=_protocols(fs).isdisjoint(_FORGETS),
        )
        tier = cls(url, fs, base, abilities, retry, scrubber)
        if writable and not tier._publishes_whole and not _PATTERN.isdisjoint(base):
            raise UnusableRequest(
                f"{tier.label}: moving a file there takes '*', '?' and '[' for a pattern; use a path without them"
            )
        try:
            if writable:
                await tier._probe()
        except BaseException:
            await tier.close()
            raise
        return tier

    @property
    def label(self) -> str:
        return self._label

    @property
    def abilities(self) -> Abilities:
        return self._abilities

    # -- reading ------------------------------------------------------------------------------------------------------

    async def entries(self, prefix: str = "") -> list[Entry]:
        folder = prefix.rpartition("/")[0]
        start = self.path(check_name(folder)) if folder else self._base

        async def find(_: int) -> dict[str, Any]:
            self.fs.invalidate_cache()
            try:
                found: dict[str, Any] = await self.call("find", start, detail=True)
            except FileNotFoundError as error:
                if is_bucket_missing(error):
                    raise
                return {}
            return found

        found = await self.guard("list", start, find)
        names = [(path[len(self._base) + 1 :], info) for path, info in found.items() if path.startswith(self._base)]
        objects = [
            Entry(name, int(info["size"] or 0)) for name, info in names if info["type"] == "file" and _is_object(name)
        ]
        return sorted((entry for entry in objects if entry.name.startswith(prefix)), key=lambda entry: entry.name)

    async def stat(self, name: str) -> Entry | None:
        path = self.path(check_name(name))

        async def info(_: int) -> Entry | None:
            self.fs.invalidate_cache()
            try:
                found = await self.call("info", path)
            except FileNotFoundError as error:
                if is_bucket_missing(error):
                    raise
                return None
            return Entry(name, int(found["size"] or 0)) if found["type"] == "file" else None

        return await self.guard("look at", name, info)

    async def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        check_range(name, offset, size_bytes)
        path = self.path(check_name(name))
        data: bytes | None
        try:
            # An empty range means everything to some file systems, and 0 is no end to others.
            data = (
                await self.guard(
                    "read", name, lambda _: self.call("cat_file", path, start=offset, end=offset + size_bytes)
                )
                if size_bytes
                else b""
            )
        except StorageFailed as failure:
            data, why = None, failure
        if data is not None and len(data) == size_bytes and size_bytes:
            return bytes(data)
        entry = await self.stat(name)
        if entry is None:
            raise NotFound(f"{self._label}/{name} does not exist")
        if offset + size_bytes > entry.size_bytes:
            raise Truncated(f"{self._label}/{name} ends before byte {offset + size_bytes}; take another copy")
        if data is None:
            raise why
        if size_bytes:
            raise StorageFailed(f"{self._label}/{name}: {len(data)} bytes came for a range of {size_bytes}; try again")
        return b""

    async def read_into(self, name: str, offset: int, view: memoryview) -> None:
        data = await self.read(name, offset, view.nbytes)
        view.cast("B")[:] = data

    # -- writing ------------------------------------------------------------------------------------------------------

    async def create(self, name: str, data: Bytes) -> None:
        path = self.path(check_name(name))
        data = bytes(data)
        if self._awaits:
            await self._put_new(name, path, data)
        else:
            async with self._create_lock:
                await self._put_new(name, path, data)

    async def _put_new(self, name: str, path: str, data: bytes) -> None:
        async def put(failures: int) -> None:
            try:
                if self._abilities.conditional_put:
                    await self.call("pipe_file", path, data, mode="create")
                    return
                if await self.stat(name) is not None:
                    raise FileExistsError(path)
                await self._put_whole(path, data)
            except FileExistsError:
                # An earlier try may have arrived although its answer did not; an empty object tells nothing of whose
                # it is, so there the safe answer is that somebody else was first.
                if not (failures and data and await self._holds(name, data)):
                    raise AlreadyExists(f"{self._label}/{name} exists already and is never overwritten") from None

        await self.guard("write", name, put)
        if not self._abilities.conditional_put and not await self._holds(name, data):
            raise AlreadyExists(f"{self._label}/{name}: another writer created it at the same moment") from None

    async def _put_whole(self, path: str, data: bytes) -> None:
        if self._publishes_whole:
            await self.call("pipe_file", path, data)
            return
        folder, _, base = path.rpartition("/")
        partial = f"{folder}/{PARTIAL}{secrets.token_hex(8)}-{base}"
        await self.call("makedirs", folder, exist_ok=True)
        try:
            await self.call("pipe_file", partial, data)
            await self.call("mv", partial, path)
        except BaseException:
            await self._remove(partial)
            raise

    async def _holds(self, name: str, data: bytes) -> bool:
        entry = await self.stat(name)
        return entry is not None and entry.size_bytes == len(data) and await self.read(name, 0, len(data)) == data

    async def upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> Upload:
        path = self.path(check_name(name))
        if self._abilities.resumable_parts:
            begun = await _multipart().begin_multipart(self, name, path, size_bytes, part_bytes, token)
            return cast("Upload", begun)
        if token is not None:
            raise NotFound(f"{self._label} cannot go on with an unfinished upload; start anew")
        if self._publishes_whole:
            return StreamUpload(self, name, path, path, size_bytes, part_bytes)
        folder, _, base = path.rpartition("/")
        await self.guard("create directory", folder, lambda _: self.call("makedirs", folder, exist_ok=True))
        return StreamUpload(
            self, name, path, f"{folder}/{PARTIAL}{secrets.token_hex(8)}-{base}", size_bytes, part_bytes
        )

    async def delete(self, name: str) -> None:
        path = self.path(check_name(name))
        await self.guard("remove", name, lambda _: self._remove(path))

    async def _remove(self, path: str) -> None:
        try:
            await self.call("rm_file", path)
        except FileNotFoundError:
            return

    async def sweep(self, prefix: str, spare: Spare = nothing) -> list[str]:
        if self._abilities.resumable_parts:
            swept = await _multipart().sweep_multipart(self, self._base, prefix, spare)
            return cast("list[str]", swept)
        found = await self.guard("list", prefix, lambda _: self._hidden())
        removed = []
        for path in found:
            folder, _, base = path[len(self._base) + 1 :].rpartition("/")
            target = base[len(PARTIAL) + 17 :]
            name = f"{folder}/{target}" if folder else target
            if base.startswith(PARTIAL) and name.startswith(prefix) and not spare(name):
                await self.guard("remove", base, lambda _, path=path: self._remove(path))  # type: ignore[misc]
                removed.append(path[len(self._base) + 1 :])
        return removed

    async def _hidden(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            return [str(path) for path in await self.call("find", self._base)]
        except FileNotFoundError:
            return []

    async def close(self) -> None:
        session = getattr(self.fs, "_s3", None) or getattr(self.fs, "_session", None)
        if session is not None and hasattr(session, "close"):
            closing = session.close()
            if inspect.isawaitable(closing):
                await closing

    # -- the file system ----------------------------------------------------------------------------------------------

    def path(self, name: str) -> str:
        return f"{self._base}/{name}"

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the file system: awaited where it runs on this loop, in a thread where it does not."""
        if self._awaits:
            return await getattr(self.fs, f"_{method}")(*args, **kwargs)
        return await asyncio.to_thread(getattr(self.fs, method), *args, **kwargs)

    async def guard(self, action: str, name: str, attempt: Callable[[int], Awaitable[T]]) -> T:
        """``attempt`` with retries; whatever it raises in the end comes out as one of the project's own errors."""
        try:
            return await with_retry(self._retry, attempt)
        except CheckpointError:
            raise
        except Exception as error:
            # No chaining: the original's text and traceback may hold credentials.
            raise self._failure(action, name, error) from None

    def _failure(self, action: str, name: str, error: Exception) -> CheckpointError:
        where = f"{self._label}/{self._scrubber.scrub(name.removeprefix(self._base).lstrip('/'))}"
        said = self._scrubber.scrub(f"{type(error).__name__}: {error}")
        kind = kind_of(error)
        if kind == "missing" and action == "read":
            return NotFound(f"cannot read {where}: it does not exist")
        if kind == "exists":
            return AlreadyExists(f"cannot {action} {where}: it exists already and is never overwritten")
        remedy = {
            "missing": "the bucket or container must exist before; create it, or correct the URL",
            "refused": "check the credentials and what they may do there",
            "transient": f"it kept failing over {self._retry.attempts} tries; check the service and the network",
        }.get(kind, "check the URL, its options and the service")
        return StorageFailed(f"cannot {action} {where}: {said}; {remedy}")

    async def _probe(self) -> None:
        """Find out by trying whether exclusive creation is honoured; also whether anything can be written at all."""
        path = self.path(f".probe-{secrets.token_hex(8)}")
        if not self._publishes_whole:
            await self.guard("create directory", "", lambda _: self.call("makedirs", self._base, exist_ok=True))

        async def honoured(_: int) -> bool:
            try:
                await self.call("pipe_file", path, b"1", mode="create")
            except (NotImplementedError, TypeError, ValueError):
                return False
            except OSError as error:
                # 501, or a complaint about the header: then a plain put must work.
                if kind_of(error) != "final":
                    raise
                return False
            try:
                await self.call("pipe_file", path, b"2", mode="create")
            except FileExistsError:
                return True
            return False

        try:
            conditional = await self.guard("write to", "", honoured)
            if self._abilities.resumable_parts:
                self.checks_payload = await self.guard(
                    "write to", "", lambda _: _multipart().checks_payload(self.fs, path)
                )
            if not conditional:
                await self.guard("write to", "", lambda _: self.call("pipe_file", path, b"3"))
        finally:
            await self.guard("clean up", "", lambda _: self._remove(path))
        # Elsewhere "create" is a look followed by a write, which two writers can both pass.
        exclusive = self._publishes_whole or not _protocols(self.fs).isdisjoint(_FORGETS)
        self._abilities = replace(self._abilities, conditional_put=conditional and exclusive)


def speaks_s3(fs: Any) -> bool:
    """Whether a file system (or its class) passes plain S3 calls through."""
    return hasattr(fs, "_call_s3")


def _multipart() -> ModuleType:
    # Needs what comes with an S3 file system only.
    return importlib.import_module("ckptengine.tiers.multipart")


def _connect(url: str, options: dict[str, Any], retry: Retry, scrubber: Scrubber, label: str) -> tuple[Any, str]:
    defaults: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        kind = fsspec.get_filesystem_class(url.partition("://")[0].partition("::")[0])
        if speaks_s3(kind):
            defaults |= {"asynchronous": True, "loop": asyncio.get_running_loop()}
            # Retries are this module's business, and stores that do not know newer checksums are to be served too.
            config = {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": min(10.0, retry.timeout_s),
                "read_timeout": retry.timeout_s,
                "max_pool_connections": 64,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
            options = options | {"config_kwargs": config | dict(options.get("config_kwargs", {}))}
        fs, base = fsspec.core.url_to_fs(url, **(defaults | options))
    except ImportError as error:
        raise UnusableRequest(f"{label}: {scrubber.scrub(str(error))}; install what it names") from None
    except Exception as error:
        said = scrubber.scrub(f"{type(error).__name__}: {error}")
        raise UnusableRequest(f"cannot open {label}: {said}; check the URL and its options") from None
    if speaks_s3(kind):
        fs.retries = 1
    if not str(base).strip("/"):
        raise UnusableRequest(f"{label} names no bucket or directory")
    return fs, str(base)


def _protocols(fs: Any) -> frozenset[str]:
    protocol = fs.protocol
    return frozenset({protocol} if isinstance(protocol, str) else protocol)


def _is_object(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))
