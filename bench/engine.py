"""What every engine under measurement looks like to the workloads."""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from .state import LiveState

Wait = Callable[[], None]
"""Blocks until the engine itself says that the save is finished; called on a thread of its own."""


class Unavailable(Exception):
    """This engine cannot run here; the message is the reason that is shown."""


def require(module: str, distribution: str | None = None) -> Any:
    """Import an optional module, or raise `Unavailable` with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = distribution or module.partition(".")[0]
        raise Unavailable(f"{package} does not import here ({error}); pip install 'ckptengine[bench]'") from error


class Engine(abc.ABC):
    """One way of checkpointing, configured as its own documentation recommends.

    `save`, `poll`, `before_update`, `after_update` and `drain` run on the training thread: what they take is time
    for which training is blocked.
    """

    distributions: ClassVar[tuple[str, ...]] = ()
    """Packages whose versions are recorded."""
    configuration: ClassVar[str] = ""
    """How it is configured, for the report."""
    durable_by_itself: ClassVar[bool] = False
    """It syncs files and directories before it says finished; else the harness does so in the background."""
    checked: ClassVar[bool] = True
    """It writes a checkpoint that can be read back and compared (the baselines do not)."""

    reshards: ClassVar[bool] = False
    """It restores DTensors onto another number of ranks."""

    def __init__(self, root: Path, state: LiveState) -> None:
        """Everything that a user does once, before the training loop.  Raises `Unavailable` where it cannot run."""
        self.root = root
        self.state = state

    def path(self, step: int) -> Path:
        """The file or directory that the checkpoint of `step` is."""
        return self.root / f"step-{step:09d}"

    @abc.abstractmethod
    def save(self, step: int) -> Wait:
        """Start one checkpoint (a synchronous engine also ends it)."""

    @abc.abstractmethod
    def restore(self, step: int) -> None:
        """Fill the live state with the checkpoint of `step`."""

    def poll(self) -> None:  # noqa: B027 (most engines need none)
        """Called before every step, for engines that finish their saves there."""

    def before_update(self) -> None:  # noqa: B027 (most engines need none)
        """Called before the optimizer's step, for engines that must have copied what it overwrites."""

    def after_update(self) -> None:  # noqa: B027 (most engines need none)
        """Called after the optimizer's step."""

    def drain(self) -> None:  # noqa: B027 (most engines need none)
        """Called after the last step, for engines that finish their saves on the training thread."""

    def discard(self, step: int) -> None:
        """Delete the checkpoint of `step`."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:  # noqa: B027 (most engines need none)
        """Everything that a user does once, after the training loop."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Installed versions of the packages that it is made of."""
        found = {}
        for distribution in cls.distributions:
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[distribution] = "not installed"
        return found


def finished() -> None:
    """The `Wait` of a synchronous engine."""
