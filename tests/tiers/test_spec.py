"""What users say about tiers, and what it opens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ckptengine.errors import UnusableRequest
from ckptengine.policy.interval import Every
from ckptengine.policy.keep import Keep
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.memory import SHARED_MEMORY, MemoryTier
from ckptengine.tiers.spec import Tier, open_tier

from .contract import loop

__all__ = ["loop"]


def test_a_directory(tmp_path: Path, loop: IoLoop) -> None:
    tier = Tier(tmp_path / "fast", interval=Every(steps=10), keep=Keep(last=2))
    assert tier.local_path == tmp_path / "fast"
    opened = open_tier(tier, loop)
    assert isinstance(opened, LocalTier)
    assert opened.label == str(tmp_path / "fast")
    assert isinstance(open_tier(f"file://{tmp_path}/other", loop), LocalTier)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no memory file system at /dev/shm")
def test_memory(loop: IoLoop) -> None:
    tier = Tier("shm://test-of-spec")
    assert tier.is_memory
    assert tier.local_path is None
    opened = open_tier(tier, loop, writable=False)
    assert isinstance(opened, MemoryTier)
    assert not opened.root.exists()


def test_a_url(loop: IoLoop) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    opened = open_tier("memory://somewhere/run", loop)
    assert opened.label == "memory://somewhere/run"


def test_secrets_stay_out_of_the_repr() -> None:
    tier = Tier("s3://AK:hush-hush@bucket/run?x=hush-hush", options={"secret": "hush-hush"})
    assert "hush" not in repr(tier)
    assert tier.label == "s3://bucket/run"


def test_without_fsspec_a_url_says_what_to_install(loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "fsspec" or name == "ckptengine.tiers.remote"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UnusableRequest, match="pip install"):
        open_tier("s3://bucket/run", loop)


def test_nonsense_is_refused() -> None:
    for bad in (
        lambda: Tier(""),
        lambda: Tier("x", interval=3),  # type: ignore[arg-type]
        lambda: Tier("x", keep=3),  # type: ignore[arg-type]
        lambda: Tier("x", max_bytes_per_s=0),
    ):
        with pytest.raises(UnusableRequest):
            bad()
