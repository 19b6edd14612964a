"""The native library's own tests, built and run as the sanitizers do it, without sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from .tree import ROOT

COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))


@pytest.mark.timeout(600)
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.skipif(sys.platform != "linux", reason="the library's tests use Linux")
def test_native() -> None:
    done = subprocess.run(["sh", "native/sanitize.sh", "plain"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.startswith("== plain\n")
    assert len(done.stdout.splitlines()) > 1, "no test said anything"
