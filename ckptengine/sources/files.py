"""Files beneath a local root or an fsspec URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ckptengine.errors import CheckpointError, NotFound, StorageFailed, Truncated, UnreadableFormat, UnusableRequest
from ckptengine.sources.handles import Handles
from ckptengine.sources.port import Files
from ckptengine.tiers.redact import Scrubber, for_fsspec, redacted_url, secrets_of

T = TypeVar("T")
MAX_OPEN_FILES = 64
INLINE = ":inline/"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


def open_files(root: str | os.PathLike[str]) -> Files:
    """The files beneath a local folder or an fsspec URL."""
    text = os.fspath(root)
    if not is_url(text):
        return LocalFiles(text)
    if text.startswith("file://"):
        return LocalFiles(text[len("file://") :])
    return RemoteFiles.from_url(text)


def is_url(text: str) -> bool:
    """True for ``protocol://...`` and for fsspec's chains (``zip::s3://...``)."""
    return _URL.match(text) is not None


def beneath(path: str) -> str:
    """``path`` with ``.`` and doubled slashes removed; `UnreadableFormat` when it would leave the root."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path or (os.sep != "/" and os.sep in path):
        raise UnreadableFormat(f"the path {path!r} leads out of the checkpoint; it is refused")
    return "/".join(parts)


class LocalFiles:
    """A local folder.  Links are followed only while they stay beneath the root.

    A snapshot folder of the Hugging Face cache (``snapshots/<revision>``) may link into its own ``blobs`` folder.
    """

    def __init__(self, root: str, also: tuple[str, ...] = ()) -> None:
        self._root = root
        real = os.path.realpath(root)
        self._allowed = [real, *also]
        above = os.path.dirname(real)
        if os.path.basename(above) == "snapshots":
            self._allowed.append(os.path.join(os.path.dirname(above), "blobs"))
        self._handles = Handles(MAX_OPEN_FILES)

    @property
    def root(self) -> str:
        return self._root

    def _real(self, path: str) -> str:
        clean = beneath(path)
        real = os.path.realpath(os.path.join(self._allowed[0], clean))
        for allowed in self._allowed:
            if real == allowed or real.startswith(allowed.rstrip(os.sep) + os.sep):
                return real
        raise UnreadableFormat(
            f"{self.shown(path)} is a link that leads out of the checkpoint; open the folder it points to, or copy it"
        )

    def shown(self, path: str) -> str:
        """The path for error messages."""
        return os.path.join(self._root, path) if path else self._root

    def _refused(self, path: str, error: OSError) -> CheckpointError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return NotFound(f"{self.shown(path)} does not exist")
        if isinstance(error, PermissionError):
            return UnusableRequest(f"cannot read {self.shown(path)}: {error.strerror}; check its permissions")
        return StorageFailed(f"cannot read {self.shown(path)}: {error.strerror or error}")

    # The three below are called for each of very many small tensors: plain calls cost half of what context managers do.

    def size(self, path: str) -> int:
        try:
            handle = self._handles.acquire(path, self._real)
        except OSError as error:
            raise self._refused(path, error) from error
        size = handle.size
        self._handles.release(handle)
        return size

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        try:
            handle = self._handles.acquire(path, self._real)
            try:
                if not 0 <= offset <= offset + nbytes <= handle.size:
                    _check_range(self.shown(path), offset, nbytes, handle.size)
                data = os.pread(handle.fd, nbytes, offset)
                while len(data) < nbytes:
                    more = os.pread(handle.fd, nbytes - len(data), offset + len(data))
                    if not more:
                        raise self._ended(path, offset + len(data), nbytes - len(data))
                    data += more
                return data
            finally:
                self._handles.release(handle)
        except OSError as error:
            raise self._refused(path, error) from error

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        view = view.cast("B")
        try:
            handle = self._handles.acquire(path, self._real)
            try:
                if not 0 <= offset <= offset + len(view) <= handle.size:
                    _check_range(self.shown(path), offset, len(view), handle.size)
                while view:
                    done = os.preadv(handle.fd, [view], offset)
                    if not done:
                        raise self._ended(path, offset, len(view))
                    view, offset = view[done:], offset + done
            finally:
                self._handles.release(handle)
        except OSError as error:
            raise self._refused(path, error) from error

    def _ended(self, path: str, offset: int, nbytes: int) -> Truncated:
        return Truncated(f"{self.shown(path)} ends at byte {offset}, {nbytes} bytes too early")

    def exists(self, path: str) -> bool:
        try:
            return os.path.exists(self._real(path))
        except UnreadableFormat:
            return False

    def entries(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self._real(folder)) as entries:
                return sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._refused(folder, error) from error

    def sub(self, folder: str) -> Files:
        if not folder:
            return self
        self._real(folder)  # refuses a folder outside the root
        return LocalFiles(os.path.join(self._root, folder), tuple(self._allowed[1:]))

    def local_path(self, path: str) -> str | None:
        return self._real(path)

    def close(self) -> None:
        self._handles.close()


def file_system(url: str) -> tuple[Any, str, str]:
    """The fsspec file system of a URL, the path in it, and the URL without credentials."""
    shown = redacted_url(url)
    try:
        import fsspec  # only URLs need it
    except ImportError:
        raise UnusableRequest(f"opening {shown} needs fsspec; pip install fsspec") from None
    try:
        bare, carried = for_fsspec(url)
        system, base = fsspec.core.url_to_fs(bare, **carried)
        system.invalidate_cache()  # fsspec keeps one system for all who ask, with what it once listed
    except ImportError as error:
        raise UnusableRequest(f"opening {shown} needs another package: {error.name or error}") from None
    except Exception as error:  # any file system may raise anything here, credentials in the text included
        protocol = url.partition("://")[0].rpartition("::")[2]
        known = protocol in fsspec.available_protocols()
        why = type(error).__name__ if known else f"fsspec knows no protocol {protocol!r}"
        raise UnusableRequest(f"cannot open {shown}: {why}") from None
    return system, str(base), shown


class RemoteFiles:
    """Files of an fsspec file system beneath one of its paths."""

    def __init__(self, system: Any, base: str, root: str, scrubber: Scrubber) -> None:
        self._system = system
        self._base = base.rstrip("/")
        self._root = root
        self._scrubber = scrubber
        self._sizes: dict[str, int] = {}

    @classmethod
    def from_url(cls, url: str) -> RemoteFiles:
        """Open ``protocol://...``; the protocol's own package must be installed."""
        system, base, shown = file_system(url)
        return cls(system, base, shown, Scrubber(secrets_of(url)))

    @property
    def root(self) -> str:
        return self._root

    def _call(self, path: str, action: Callable[[str], T]) -> T:
        full = posixpath.join(self._base, beneath(path)) if path else self._base
        shown = f"{self._root.rstrip('/')}/{path}" if path else self._root
        try:
            return action(full)
        except CheckpointError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{shown} does not exist") from None
        except PermissionError:
            raise UnusableRequest(f"cannot read {shown}: access denied; check the credentials") from None
        except Exception as error:  # each file system has errors of its own; their text may hold credentials
            said = self._scrubber.scrub(f"{type(error).__name__}: {error}")
            raise StorageFailed(f"cannot read {shown}: {said}; check the URL and the service") from None

    def size(self, path: str) -> int:
        if path not in self._sizes:
            self._sizes[path] = self._call(path, lambda full: int(self._system.info(full)["size"]))
        return self._sizes[path]

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        _check_range(f"{self._root}/{path}", offset, nbytes, self.size(path))
        if nbytes == 0:
            return b""
        data = bytes(self._call(path, lambda full: self._system.cat_file(full, start=offset, end=offset + nbytes)))
        if len(data) != nbytes:
            raise Truncated(f"{self._root}/{path}: {len(data)} of {nbytes} bytes could be read at byte {offset}")
        return data

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        view = view.cast("B")
        view[:] = self.read(path, offset, len(view))

    def exists(self, path: str) -> bool:
        return bool(self._call(path, self._system.exists))

    def entries(self, folder: str = "") -> list[str]:
        try:
            found = self._call(folder, lambda full: self._system.ls(full, detail=True))
        except NotFound:
            return []
        prefix = posixpath.join(self._base, folder).rstrip("/") if folder else self._base
        names = []
        for entry in found:
            name = str(entry["name"]).rstrip("/")
            if name.strip("/") != prefix.strip("/"):
                names.append(posixpath.basename(name) + ("/" if entry["type"] == "directory" else ""))
        return sorted(names)

    def sub(self, folder: str) -> Files:
        if not folder:
            return self
        clean = beneath(folder)
        base, root = posixpath.join(self._base, clean), f"{self._root.rstrip('/')}/{clean}"
        return RemoteFiles(self._system, base, root, self._scrubber)

    def local_path(self, path: str) -> str | None:
        return None

    def close(self) -> None:
        self._sizes.clear()


class InlineFiles:
    """Other files plus small byte strings under names of their own.

    For tensors whose bytes are no range of any file, such as a step counter that a pickle holds as a number.
    """

    def __init__(self, base: Files) -> None:
        self._base = base
        self._blobs: dict[str, bytes] = {}
        self._paths: dict[bytes, str] = {}

    def add(self, data: bytes) -> str:
        """The path under which ``data`` can be read from now on; equal bytes share one path."""
        path = self._paths.get(data)
        if path is None:
            path = self._paths[data] = f"{INLINE}{len(self._blobs)}"
            self._blobs[path] = data
        return path

    @property
    def root(self) -> str:
        return self._base.root

    def size(self, path: str) -> int:
        blob = self._blobs.get(path)
        return self._base.size(path) if blob is None else len(blob)

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        blob = self._blobs.get(path)
        if blob is None:
            return self._base.read(path, offset, nbytes)
        _check_range(path, offset, nbytes, len(blob))
        return blob[offset : offset + nbytes]

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        if path not in self._blobs:
            self._base.read_into(path, offset, view)
            return
        view = view.cast("B")
        view[:] = self.read(path, offset, len(view))

    def exists(self, path: str) -> bool:
        return path in self._blobs or self._base.exists(path)

    def entries(self, folder: str = "") -> list[str]:
        return self._base.entries(folder)

    def sub(self, folder: str) -> Files:
        return self._base.sub(folder)

    def local_path(self, path: str) -> str | None:
        return None if path in self._blobs else self._base.local_path(path)

    def close(self) -> None:
        self._base.close()


def _check_range(shown: str, offset: int, nbytes: int, size: int) -> None:
    if offset < 0 or nbytes < 0:
        raise UnreadableFormat(f"a read of {nbytes} bytes at byte {offset} of {shown} makes no sense")
    if offset + nbytes > size:
        raise Truncated(f"{shown} has {size} bytes, but its record says that bytes {offset} to {offset + nbytes} exist")
