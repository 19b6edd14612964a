"""A few random kills of a job with three tiers; two hundred with ``python -m bench.kills``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_random_kills() -> None:
    command = [sys.executable, "-m", "bench.kills", "--kills", "3", "--elements", "20000", "--longest", "1.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["figures"]["kills"] == 3
