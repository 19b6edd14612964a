"""Conversions from and to a real S3 server, as a user runs them: killed in between, gone on with, opened again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptengine.errors import AlreadyExists, UnreadableFormat
from ckptengine.operations.convert import convert
from ckptengine.operations.opening import open_any
from tests.operations_convert.test_convert import KILL_AFTER, assert_holds, checkpoint
from tests.tiers.services import make_bucket, moto, s3_options

KILLED = f"""{KILL_AFTER}
kill_after(int(sys.argv[3]))
convert(sys.argv[1], sys.argv[2], to="zarr", workers=1)
"""


def test_to_s3_killed_and_gone_on_with_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    s3fs.S3FileSystem.clear_instance_cache()  # one of another test would talk to that test's server
    with moto(tmp_path) as endpoint:
        asyncio.run(make_bucket(endpoint))
        options = s3_options(endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(options["key"]))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(options["secret"]))
        source, arrays = checkpoint(tmp_path / "in")
        convert(source, tmp_path / "local", to="safetensors")
        there = "s3://ckpt/converted/run"
        command = [sys.executable, "-c", KILLED, str(tmp_path / "local"), there, "4"]
        died = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr
        with pytest.raises(UnreadableFormat):
            open_any(there)  # nothing that could be taken for a checkpoint

        monkeypatch.setattr("ckptengine.universal.write.UNIT_TENSORS", 1)
        plan = convert(tmp_path / "local", there, to="zarr", verify=True)
        assert (plan.state, plan.verified) == ("committed", len(arrays))
        with pytest.raises(AlreadyExists):
            convert(tmp_path / "local", there, to="zarr")

        assert convert(there, tmp_path / "back", to="native").compared == len(arrays)
        assert_holds(tmp_path / "back", arrays)
    s3fs.S3FileSystem.clear_instance_cache()
