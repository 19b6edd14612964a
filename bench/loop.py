"""A training loop with every moment written down: what it computes, where it is blocked, when saves are durable."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from .durability import make_durable
from .engine import Engine, Wait
from .state import TrainingState
from .text import tokens

clock = time.monotonic


@dataclasses.dataclass(slots=True)
class Step:
    """One training step: when it ran, and how much of that the engine held it up."""

    start_s: float
    end_s: float
    blocked_s: float


@dataclasses.dataclass(slots=True)
class Save:
    """One save: the call, the fences that waited for it, and the moment at which it was durable."""

    step: int
    start_s: float
    returned_s: float
    fence_s: float = 0.0
    durable_s: float | None = None
    error: str | None = None

    @property
    def blocked_s(self) -> float:
        """What the training thread waited for this save."""
        return self.returned_s - self.start_s + self.fence_s


class Watch:
    """Waits on a thread of its own until a save is finished, makes it durable where the engine does not, notes when."""

    def __init__(self, engine: Engine, save: Save, wait: Wait) -> None:
        self._engine, self._save, self._wait = engine, save, wait
        self._thread = threading.Thread(target=self._run, name=f"watch-{save.step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
            if not self._engine.durable_by_itself and self._engine.checked:
                make_durable(self._engine.path(self._save.step))
            self._save.durable_s = clock()
        except Exception as error:
            self._save.error = f"{type(error).__name__}: {error}"

    def join(self, timeout_s: float) -> None:
        """Wait until the save is durable or has failed; a failure or the time-out is raised."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the save of step {self._save.step} was not durable after {timeout_s:.0f} s")
        if self._save.error is not None:
            raise RuntimeError(f"the save of step {self._save.step} failed: {self._save.error}")


@dataclasses.dataclass(slots=True)
class Trace:
    """Everything that happened in one block of steps."""

    start_s: float
    steps: list[Step] = dataclasses.field(default_factory=list)
    saves: list[Save] = dataclasses.field(default_factory=list)
    end_s: float = 0.0
    """After the last step."""
    drained_s: float = 0.0
    """When the last save was durable."""

    def to_json(self) -> dict[str, Any]:
        """Moments in seconds from the start of the block."""
        return {
            "steps": [[step.start_s - self.start_s, step.end_s - self.start_s, step.blocked_s] for step in self.steps],
            "saves": [
                {
                    "step": save.step,
                    "start_s": save.start_s - self.start_s,
                    "returned_s": save.returned_s - self.start_s,
                    "fence_s": save.fence_s,
                    "durable_s": None if save.durable_s is None else save.durable_s - self.start_s,
                }
                for save in self.saves
            ],
            "end_s": self.end_s - self.start_s,
            "drained_s": self.drained_s - self.start_s,
        }


class Trainer:
    """Runs steps of a GPT over real text; the same steps give the same bits."""

    def __init__(self, state: TrainingState, longest_block: int) -> None:
        self.state = state
        shape = state.shape
        self._per_batch = shape.batch * shape.context
        text = tokens(shape.vocabulary, self._per_batch * (longest_block + 1) + 1)
        self._text = text.to(next(state.model.parameters()).device)

    def batch(self, number: int) -> tuple[Any, Any]:
        """Inputs and targets of one step: int64[batch, context] each."""
        shape = self.state.shape
        start = number * self._per_batch
        inputs = self._text[start : start + self._per_batch].view(shape.batch, shape.context)
        targets = self._text[start + 1 : start + 1 + self._per_batch].view(shape.batch, shape.context)
        return inputs, targets

    def step(self, number: int, engine: Engine | None) -> tuple[Step, float]:
        """One step; the seconds of it that the fence took are returned beside it."""
        start = clock()
        if engine is not None:
            engine.poll()
        polled = clock() - start
        loss = self.state.model(*self.batch(number))
        loss.backward()
        fenced = 0.0
        if engine is not None:
            before = clock()
            engine.before_update()
            fenced = clock() - before
        self.state.optimizer.step()
        after_update = 0.0
        if engine is not None:
            before = clock()
            engine.after_update()
            after_update = clock() - before
        self.state.optimizer.zero_grad()
        loss.item()
        blocked = polled + fenced + after_update
        return Step(start, clock(), blocked), blocked

    def run(self, steps: int, engine: Engine | None, every: int, first_save: int, timeout_s: float) -> Trace:
        """Train for `steps` steps; save after the first and then every `every`-th, and drain.

        The save after step `n` of the block is numbered `first_save + n`.
        """
        trace = Trace(clock())
        watches = []
        for number in range(steps):
            step, blocked = self.step(number, engine)
            trace.steps.append(step)
            if trace.saves:
                trace.saves[-1].fence_s += blocked
            if engine is not None and number % every == 0:
                start = clock()
                wait = engine.save(first_save + number)
                save = Save(first_save + number, start, clock())
                trace.saves.append(save)
                watches.append(Watch(engine, save, wait))
        trace.end_s = clock()
        if engine is not None:
            engine.drain()
        for watch in watches:
            watch.join(timeout_s)
        trace.drained_s = clock()
        return trace
