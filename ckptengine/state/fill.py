"""`prepare`: match a live state with a checkpoint, report every difference, and say which memory to fill.

The order of a restore: `prepare` (nothing live changes), fill the bytes of every `Target`, `Filling.commit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptengine.errors import NotFound, RestoreIncomplete, StateMismatch
from ckptengine.state import random as streams
from ckptengine.state.collection import no_collection
from ckptengine.state.context import ABSENT, Absent, Build, Context, OnMissing, SavedState
from ckptengine.state.encoding import Json
from ckptengine.state.flatten import collect
from ckptengine.state.names import RankMark, split
from ckptengine.state.offered import offer
from ckptengine.state.restore_values import Matcher
from ckptengine.state.selection import Selection
from ckptengine.state.target import Target
from ckptengine.state.tensors import ON_META

__all__ = ["Differences", "Filling", "SavedState", "Target", "prepare"]

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Filling:
    """A restore that is ready: where bytes go, and what follows once they are there.

    ``unused``: what the checkpoint has beyond this live state (tensors and plain values, by name).  With several ranks
    a name counts as extra only if it is unused on all of them.  ``trials``: targets of expanded tensors, to be filled
    and looked at with `try_out` before the live state is touched; they are among ``targets`` too.
    """

    targets: tuple[Target, ...]
    unused: tuple[str, ...]
    _context: Context
    _root: Build
    _streams: dict[str, Json] | None
    _policy: streams.Policy

    @property
    def trials(self) -> tuple[Target, ...]:
        return tuple(trial.target for trial in self._context.trials)

    def try_out(self) -> None:
        """`StateMismatch` where a filled trial shows elements that the live tensor has no memory for."""
        problems = tuple(told for trial in self._context.trials if (told := trial.problem()) is not None)
        if problems:
            raise StateMismatch(_report(list(problems), False), problems)

    def commit(self) -> None:
        """Make the live state the restored one; every target must have been filled.

        In order: converted counters, modules, optimizers, plain values in their containers, schedulers, other objects,
        loaders, random streams.  An object that refuses its state raises `RestoreIncomplete`: the live state is then
        partly restored and must not be used.
        """
        actions = self._context.actions
        try:
            with torch.no_grad():
                for stage in self._context.staged:
                    stage()
            for action in actions["modules"]:
                action()
            with no_collection():  # a fresh optimizer gets very many small objects
                for action in actions["optimizers"]:
                    action()
            self._root()
            for phase in ("schedulers", "others", "loaders"):
                for action in actions[phase]:
                    action()
            if self._streams is not None:
                streams.restore(self._streams, self._policy)
        except RestoreIncomplete:
            raise
        except Exception as error:
            raise RestoreIncomplete(
                f"an object of the state refused what was saved for it ({error!r}); the live state is partly "
                f"restored and must not be used; build it anew and restore again"
            ) from error


class Differences(StateMismatch):
    """A `StateMismatch` with what the checkpoint has beyond this live state, which other ranks may use: ``unused``."""

    def __init__(self, message: str, problems: tuple[str, ...], unused: tuple[str, ...]) -> None:
        super().__init__(message, problems)
        self.unused = unused


def prepare(
    state: object,
    saved: SavedState,
    *,
    names: Sequence[str] | None = None,
    strict: bool = True,
    random: bool = True,
    alone: bool = True,
    on_missing_rank: OnMissing = "problem",
    random_policy: streams.Policy = "exact",
) -> Filling:
    """Match ``state`` with ``saved`` and plan its restore; nothing live is changed.

    ``names`` restricts the restore to those names, prefixes or globs.  ``strict`` makes a live leaf that the checkpoint
    lacks, and (if ``alone``) a saved one that is not live, a problem; shapes, dtypes and kinds always are.  ``alone``
    is False where other ranks may use what this one does not: then read `Filling.unused`.  ``random``: restore the
    random streams in ``saved.rank_values``.  ``on_missing_rank`` says what a `PerRank` value does whose rank was not
    saved.  Raises `StateMismatch` with every problem, `NotFound` for ``names`` that select nothing, and
    `UnsupportedValue` for a live state that cannot be walked.
    """
    selection = Selection.of(names)
    with no_collection():
        walk = collect(state, meta_ok=True)
    context = Context(walk, saved, selection, on_missing_rank)
    context.problems += [f"{name}: {ON_META}" for name in walk.on_meta if selection.covers(name)]
    data: Json | Absent = ABSENT if saved.values is None else saved.values
    with no_collection():
        matcher = Matcher(context)
        root = matcher.match(state, data, "")
        if saved.offered is not None:
            offer(context, state, saved.offered, matcher.is_structural)
    chosen = _streams(context, saved, random and selection.everything, random_policy)
    unused = _unused(context)
    problems = list(dict.fromkeys(context.problems))
    if not strict:
        problems = [one for one in problems if one not in context.forgivable]
    elif alone and selection.everything:
        problems += [f"{name}: in the checkpoint, not in the live state" for name in unused]
    if problems:
        raise Differences(_report(problems, strict), tuple(problems), () if alone else unused)
    if not (selection.everything or context.targets or context.found_any or unused):
        raise NotFound(f"names={list(selection.patterns or ())} selects nothing of the checkpoint")
    return Filling(tuple(context.targets), unused, context, root, chosen, random_policy)


def _report(problems: list[str], strict: bool) -> str:
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    hint = "pass strict=False to leave out what is missing or extra, or names= to restore a part" if strict else ""
    many = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
    head = f"the live state does not fit the checkpoint ({many})"
    return f"{head}:\n  {shown}{more}\n{hint}".rstrip()


def _streams(context: Context, saved: SavedState, wanted: bool, policy: streams.Policy) -> dict[str, Json] | None:
    found: Any = saved.rank_values.get("random") if wanted and isinstance(saved.rank_values, dict) else None
    if found is None:
        return None
    context.problems += streams.problems(found, policy)
    return found if isinstance(found, dict) else None


def _unused(context: Context) -> tuple[str, ...]:
    """Saved names that nothing live asked for; another rank's own leaves do not count."""
    used = context.used | set(context.walk.aliases)
    left = [
        name
        for name in context.saved.tensors
        if name not in used
        and context.selection.covers(name)
        and not ("\\@" in name and isinstance(split(name)[-1], RankMark))
    ]
    told = set(left)
    for name in left:  # an extra container is told by its tensors
        while (name := name.rpartition(".")[0]) and name not in told:
            told.add(name)
    extra = (name for name in dict.fromkeys(context.extra) if name not in told and context.stored(name) is None)
    return (*left, *(name for name in extra if context.selection.covers(name)))
