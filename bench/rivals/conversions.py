"""Converters: what each engine offers to turn one format into another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from ..disk import BLOCK_BYTES, aligned_buffer, open_direct, round_up
from ..durability import files_under
from ..engine import require

Convert = Callable[[Path, Path], None]
"""From the source to a target that does not exist yet."""


def _own(target_format: str, layout: str | None = None, options: Mapping[str, object] | None = None) -> Convert:
    def convert(source: Path, target: Path) -> None:
        require("ckptengine").convert(str(source), str(target), to=target_format, layout=layout, options=options)

    return convert


def _dcp_to_torch(source: Path, target: Path) -> None:
    dcp_to_torch_save(source, target)


def _torch_to_dcp(source: Path, target: Path) -> None:
    torch_save_to_dcp(source, target)


def _deepspeed_script(name: str, arguments: Callable[[Path, Path], list[str]]) -> Convert:
    def convert(source: Path, target: Path) -> None:
        require(f"deepspeed.{name}", "deepspeed")
        command = [sys.executable, "-m", f"deepspeed.{name}", *arguments(source, target)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise RuntimeError(f"deepspeed.{name} ended with status {done.returncode}: {tail[0] if tail else ''}")

    return convert


def _universal(source: Path, target: Path) -> list[str]:
    return ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]


def _fp32(source: Path, target: Path) -> list[str]:
    return [str(source.parent), str(target)]


def copy_directly(source: Path, target: Path) -> None:
    """The same bytes by direct reads and writes: the limit of the disk for a conversion."""
    buffer = aligned_buffer(BLOCK_BYTES)
    view = memoryview(buffer)
    target.mkdir()
    for number, file in enumerate(files_under(source)):
        size = file.stat().st_size
        reader, _ = open_direct(file, os.O_RDONLY)
        writer, _ = open_direct(target / str(number), os.O_CREAT | os.O_WRONLY)
        try:
            for offset in range(0, size, BLOCK_BYTES):
                os.preadv(reader, [buffer], offset)
                os.pwrite(writer, view[: min(BLOCK_BYTES, round_up(size - offset))], offset)
            os.fsync(writer)
        finally:
            os.close(reader)
            os.close(writer)


CONVERSIONS: dict[str, dict[str, Convert]] = {
    "dcp -> torch": {"pwrite": copy_directly, "ckptengine": _own("torch"), "dcp-save": _dcp_to_torch},
    "torch -> dcp": {"pwrite": copy_directly, "ckptengine": _own("dcp"), "dcp-save": _torch_to_dcp},
    "dcp -> safetensors": {"ckptengine": _own("safetensors")},
    "dcp -> zarr": {"ckptengine": _own("zarr")},
    "dcp -> native": {"ckptengine": _own("native")},
    "deepspeed -> universal": {
        "pwrite": copy_directly,
        "ckptengine": _own("deepspeed-universal"),
        "deepspeed-fast": _deepspeed_script("checkpoint.ds_to_universal", _universal),
    },
    "deepspeed -> fp32 weights": {
        "ckptengine": _own("safetensors", options={"weights_only": True}),
        "deepspeed-fast": _deepspeed_script("utils.zero_to_fp32", _fp32),
    },
    "deepspeed -> safetensors": {"ckptengine": _own("safetensors")},
    "deepspeed -> zarr": {"ckptengine": _own("zarr")},
    "deepspeed -> dcp": {"ckptengine": _own("dcp")},
    "deepspeed -> native": {"ckptengine": _own("native")},
    "deepspeed -> deepspeed": {"ckptengine": _own("deepspeed", "dp=2,zero=1")},
}
"""Source and target format: the converter of each engine that has one."""
