"""Who may import whom: the rows of docs/design/0001-house.md, and which third-party package is at home where."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .tree import PACKAGE, ROOT, Imported, imports, modules

ALLOWED = {
    "numpy": (
        *("layout", "native", "plan", "state", "store", "snapshot"),
        *("sources", "universal", "operations", "demo", "checkpoint.py"),
    ),
    "torch": (
        "state",
        "snapshot",
        "coordination",
        "operations",
        "checkpointer.py",
        "checkpoint.py",
        "integrations",
        "demo",
    ),
    "fsspec": ("tiers/remote.py", "tiers/stream.py", "sources/files.py"),
    "aiofiles": ("tiers/local.py",),
    "aiohttp": ("tiers/part_body.py",),
    "zarr": ("universal",),
    "numcodecs": ("universal",),
    "google_crc32c": ("universal",),
    "ml_dtypes": ("universal",),
    "prometheus_client": ("observe/prometheus.py",),
    "distributed": ("operations/converting/on_dask.py",),
    "matplotlib": ("demo/picture.py",),
}
"""Third-party package -> the folders and modules of the package that may import it."""

INSIDE = {
    "ckptengine/sources/files.py": "fsspec",
    "ckptengine/universal/chunks.py": "codecs of foreign zarr arrays",
    "ckptengine/demo/train.py": "FSDP, which takes long to import, when there are several ranks",
}
"""Modules that import third-party packages inside functions, and what: extras that most calls do without."""

PURE = ("errors", "layout", "plan", "policy", "native", "store", "cli.ls", "cli.prune")
"""What must not load torch, directly or through anything else."""


def all_imports() -> list[Imported]:
    return [found for module in modules(PACKAGE) for found in imports(module)]


def test_rows() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def test_third_party_packages_only_where_they_are_at_home() -> None:
    strangers = []
    for found in all_imports():
        if found.top == PACKAGE or found.top in sys.stdlib_module_names:
            continue
        place = found.module.removeprefix(f"{PACKAGE}/")
        homes = ALLOWED.get(found.top, ())
        if not any(place == home or place.startswith(f"{home}/") for home in homes):
            strangers.append(str(found))
    assert not strangers


def test_every_allowance_is_used() -> None:
    used = {(found.top, found.module.removeprefix(f"{PACKAGE}/")) for found in all_imports()}
    idle = [
        (package, home)
        for package, homes in ALLOWED.items()
        for home in homes
        if home != "integrations"  # leaves that a user's framework loads
        and not any(top == package and (place == home or place.startswith(f"{home}/")) for top, place in used)
    ]
    assert not idle


def test_no_import_inside_a_function_but_of_extras() -> None:
    hidden = [
        str(found)
        for module in modules(PACKAGE)
        for found in imports(module)
        if found.inside
        and (found.top == PACKAGE or found.top in sys.stdlib_module_names or module.path not in INSIDE)
        and not is_dynamic(module.text.splitlines()[found.line - 1])
    ]
    assert not hidden


def is_dynamic(line: str) -> bool:
    """By name at run time, which says so itself (an optional part, a command)."""
    return "import_module(" in line or "optional_module(" in line


def test_nothing_imports_the_package_itself() -> None:
    submodules = {path.stem for path in (ROOT / PACKAGE).iterdir()} | {"_native"}
    wrong = [
        str(found)
        for found in all_imports()
        if found.name == PACKAGE or (found.top == PACKAGE and found.name.split(".")[1] not in submodules)
    ]
    assert not wrong


@pytest.mark.parametrize("row", PURE)
def test_no_torch(row: str) -> None:
    program = (
        "import importlib, pkgutil, sys\n"
        f"top = importlib.import_module('{PACKAGE}.{row}')\n"
        "for found in pkgutil.walk_packages(getattr(top, '__path__', []), top.__name__ + '.'):\n"
        "    importlib.import_module(found.name)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_opening_a_checkpoint_does_not_wait_for_what_only_training_needs() -> None:
    program = (
        f"import sys, torch, {PACKAGE}.checkpoint\n"
        "print('torch.distributed.tensor' in sys.modules or 'sympy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
