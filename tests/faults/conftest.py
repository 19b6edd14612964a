"""Folders in memory, one compute thread, and the expected log lines kept out of the report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .memory_folder import memory_folder


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def _one_compute_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("ckptengine").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("ckptengine").setLevel(logging.NOTSET)
    torch.set_num_threads(before)
