"""The memory tier: the contract, privacy, and survival of the process."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptengine.errors import StorageFailed, UnusableRequest
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.memory import SHARED_MEMORY, MemoryTier

from .contract import TierContract, loop

__all__ = ["loop"]

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no memory file system at /dev/shm")


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A directory on the real memory file system, removed afterwards."""
    base = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    yield base
    shutil.rmtree(base)


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self, base: Path) -> MemoryTier:
        return MemoryTier("job", base=base)

    def test_it_never_claims_to_survive_a_power_cut(self, tier: MemoryTier) -> None:
        assert tier.abilities.survives_process
        assert not tier.abilities.survives_power_cut


def test_private_to_the_user(base: Path, loop: IoLoop) -> None:
    tier = MemoryTier("job", base=base)
    BlockingTier(tier, loop).create("step-000000001/a", b"x")
    for path in (tier.root.parent, tier.root, tier.root / "step-000000001"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((tier.root / "step-000000001" / "a").stat().st_mode) == 0o600


def test_a_place_that_others_can_enter_is_refused(base: Path) -> None:
    home = base / f"ckptengine-{os.getuid()}"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    with pytest.raises(StorageFailed, match="private"):
        MemoryTier("job", base=base)
    home.rmdir()
    (base / "elsewhere").mkdir()
    home.symlink_to(base / "elsewhere")
    with pytest.raises(StorageFailed, match="private"):
        MemoryTier("job", base=base)


def test_it_outlives_the_process_that_wrote_it(base: Path, loop: IoLoop) -> None:
    script = (
        "import os, sys, pathlib\n"
        "from ckptengine.tiers.loop import BlockingTier, IoLoop\n"
        "from ckptengine.tiers.memory import MemoryTier\n"
        "tier = MemoryTier('job', base=pathlib.Path(sys.argv[1]))\n"
        "BlockingTier(tier, IoLoop()).create('step-000000001/a', b'still here')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run([sys.executable, "-c", script, str(base)], check=False, timeout=60)
    assert died.returncode == -9
    assert BlockingTier(MemoryTier("job", base=base), loop).read("step-000000001/a", 0, 10) == b"still here"


def test_no_memory_file_system(tmp_path: Path) -> None:
    with pytest.raises(UnusableRequest, match="memory"):
        MemoryTier("job", base=tmp_path / "none")
