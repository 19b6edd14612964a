"""Real services for the tests: started on demand, on 127.0.0.1, each ended by whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptengine.tiers.cancelling import cancel_all

USER = "testuser"
SECRET = "test-secret-9f8e7d6c"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """The program, from the environment of this interpreter or the path; skips where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def process(
    command: list[str], log: Path, ready: Callable[[], bool], env: dict[str, str] | None = None
) -> Iterator[None]:
    """Run ``command`` until the block ends; skips where it does not come up within 30 s."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
        try:
            deadline = time.monotonic() + 30
            while not ready():
                if started.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"{command[0]} did not start: {log.read_text()[-300:]}")
                time.sleep(0.05)
            yield
        finally:
            started.terminate()
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait(10)


def answers(port: int) -> bool:
    """Whether something speaks HTTP there."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[str]:
    """An S3 server that honours conditional puts; its endpoint."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    port = free_port()
    with process(
        [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)], directory / "moto.log", lambda: answers(port)
    ):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gateway(directory: Path) -> Iterator[str]:
    """An S3 server that does not honour conditional puts (its bucket is called ``ckpt``); its endpoint."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    port = free_port()
    juicefs, database = formatted(directory)
    command = [juicefs, "gateway", "--no-usage-report", "--cache-dir", str(directory / "cache"), database]
    user = {"MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": SECRET}
    with process([*command, f"127.0.0.1:{port}"], directory / "gateway.log", lambda: answers(port), user):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def google(directory: Path) -> Iterator[dict[str, object]]:
    """A Google Cloud Storage emulator with a bucket ``ckpt``; the storage options that reach it."""
    # Else gcsfs asks the real service, over gRPC, what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    port = free_port()
    command = [tool("gcp-storage-emulator"), "-d", str(directory), "start", "--host=127.0.0.1", f"--port={port}"]
    with process([*command, "--in-memory", "--default-bucket=ckpt"], directory / "gcs.log", lambda: answers(port)):
        yield {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon", "project": "test"}


@contextlib.contextmanager
def azure(directory: Path) -> Iterator[dict[str, object]]:
    """An Azure Blob Storage emulator; the storage options that reach it, with its published key."""
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    port = free_port()
    command = [tool("azurite-blob"), "--silent", "--skipApiVersionCheck", "--location", str(directory)]
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    text = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
    text += f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    with process([*command, "--blobPort", str(port)], directory / "azurite.log", lambda: answers(port)):
        yield {"connection_string": text}


@contextlib.contextmanager
def fuse(directory: Path) -> Iterator[Path]:
    """A FUSE network file system; where it is mounted."""
    if not os.path.exists("/dev/fuse") or os.getuid() != 0:
        pytest.skip("mounting FUSE needs /dev/fuse and root")
    juicefs, database = formatted(directory)
    mount = directory / "mount"
    mount.mkdir()
    command = [juicefs, "mount", "--no-usage-report", "--cache-dir", str(directory / "cache"), database, str(mount)]
    with process(command, directory / "mount.log", lambda: os.path.ismount(mount)):
        try:
            yield mount
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=False)


def formatted(directory: Path) -> tuple[str, str]:
    """The juicefs program and the database of a new volume beneath ``directory``."""
    juicefs, database = tool("juicefs"), f"sqlite3://{directory}/meta.db"
    made = subprocess.run(
        [juicefs, "format", "--storage", "file", "--bucket", f"{directory}/blocks/", database, "ckpt"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"juicefs format failed: {made.stderr[-300:]!r}")
    return juicefs, database


def s3_options(endpoint: str) -> dict[str, object]:
    return {"key": USER, "secret": SECRET, "endpoint_url": endpoint}


async def make_bucket(endpoint: str, name: str = "ckpt") -> None:
    """Create a bucket on a server that has none."""
    from ckptengine.tiers.remote import RemoteTier

    tier = await RemoteTier.open(f"s3://{name}/x", options=s3_options(endpoint), writable=False)
    await tier.call("mkdir", name)
    await tier.close()


class FlakyProxy:
    """A TCP proxy that a test can make drop, stall or answer for its server.

    ``trouble(number)`` is asked for every connection, counted from 0: "" passes it through, "drop" closes it at once,
    "cut" closes it after 64 KiB have been sent, "swallow" delivers the request and loses the answer, "stall" never
    answers, and a number such as "503" is the status it answers with.
    """

    def __init__(self, target: str, trouble: Callable[[int], str]) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._trouble = trouble
        self.connections = 0
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        async def start() -> asyncio.Server:
            return await asyncio.start_server(self._handle, "127.0.0.1", self.port)

        server = self._loop.run_until_complete(start())
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(cancel_all())
        self._loop.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        trouble = self._trouble(self.connections)
        self.connections += 1
        try:
            if trouble == "drop":
                return
            if trouble == "stall":
                await asyncio.sleep(3600)
            if trouble.isdigit():
                await reader.read(1 << 16)
                reply = f"HTTP/1.1 {trouble} Trouble\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                writer.write(reply.encode())
                await writer.drain()
                return
            await self._pass_on(reader, writer, trouble)
        except (OSError, asyncio.CancelledError):
            pass  # either side is gone, or the test is over
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trouble: str) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter | None, limit: float) -> None:
            passed = 0
            while passed < limit and (data := await source.read(1 << 16)):
                passed += len(data)
                if sink is not None:
                    sink.write(data)
                    await sink.drain()

        there = asyncio.create_task(pump(reader, upstream_writer, 1 << 16 if trouble == "cut" else math.inf))
        # A swallowed answer: the request goes through whole; the beginning of the answer is read here, and lost.
        sink, limit = (None, 1) if trouble == "swallow" else (writer, math.inf)
        back = asyncio.create_task(pump(upstream_reader, sink, limit))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            there.cancel()
            back.cancel()
            upstream_writer.close()
