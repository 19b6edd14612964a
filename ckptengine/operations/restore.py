"""The verb restore: fill a live state in place from the newest checkpoint that verifies, the same one on all ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ckptengine.coordination.port import Coordinator, agree
from ckptengine.errors import (
    CheckpointError,
    Damaged,
    LayoutError,
    NotFound,
    RestoreIncomplete,
    StateMismatch,
    StorageFailed,
    UnreadableFormat,
    UnsupportedValue,
)
from ckptengine.operations.filling.fill import Fill
from ckptengine.snapshot import fence
from ckptengine.sources.native import NativeSource, open_commit
from ckptengine.sources.optimizers import numbered_groups, with_groups
from ckptengine.sources.port import Files, HoldsEncodedValues, Source
from ckptengine.state import random as streams
from ckptengine.state.collection import no_collection
from ckptengine.state.fill import Differences, Filling, SavedState, prepare
from ckptengine.store.history import CommitRef
from ckptengine.store.root import Root

log = logging.getLogger("ckptengine")

WorldPolicy = Literal["derive", "exact", "fail"]
"""What becomes of random streams and per-rank values when the number of ranks is another than at the save.

``derive``: every rank gets new streams that are a function of the saved ones, its number and the number of ranks; ranks
that existed keep their per-rank values, new ones keep their live values.  ``exact``: ranks go on with what was saved
under their number; a rank that did not exist is a problem.  ``fail``: any change is a problem.
"""
_SHOWN = 20

BAD_COPY = (Damaged, NotFound, UnreadableFormat, LayoutError, StorageFailed)
"""What makes a restore turn to another copy: wrong, missing or unreadable bytes."""


@dataclass(slots=True, kw_only=True)
class RestoreRequest:
    """What to fill, from what.  ``names``: only leaves whose name matches one of these (prefixes or globs).

    ``touched``: filling has begun, so that whatever ends it early leaves the state between two steps.
    """

    state: Any
    names: Sequence[str] | None = None
    strict: bool = True
    random: bool = True
    on_world_change: WorldPolicy = "derive"
    timeout_s: float = 300.0
    touched: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """The step that was restored, and which newer ones were passed over and why."""

    ref: CommitRef
    passed_over: tuple[tuple[int, str], ...] = ()

    @property
    def step(self) -> int:
        return self.ref.step


class _Round:
    """One restore of one rank: numbered votes, so that all ranks walk the same candidates."""

    def __init__(self, port: Coordinator, request: RestoreRequest, number: int) -> None:
        self.port, self.request = port, request
        self._number, self._votes = number, 0

    def vote(self, document: Any) -> list[Any]:
        self._votes += 1
        return agree(self.port, f"restore/{self._number}/{self._votes}", document, self.request.timeout_s)

    def all_good(self, error: CheckpointError | None, source: Source | None = None) -> str | None:
        """None when every rank is well, else what went wrong where; also when not all have opened one ``source``."""
        opened = _identity(source) if self.port.world > 1 else None
        told = self.vote([None if error is None else str(error), opened])
        first = told[0][1]
        votes = [
            "what it has under the name of this commit is another job's"
            if why is None and first is not None and one != first
            else why
            for why, one in told
        ]
        wrong = [f"rank {rank}: {told}" for rank, told in enumerate(votes) if told is not None]
        if len(votes) == 1:
            wrong = [told for told in votes if told is not None]
        return "; ".join(wrong[:4]) or None


def _identity(source: Source | None) -> str | None:
    """What tells a commit of ours from others of the same step, attempt and save."""
    if not isinstance(source, NativeSource):
        return None
    files = [(file.nbytes, file.tail_crc) for file in source.manifest.files]
    return hashlib.sha256(repr((source.manifest.run, files)).encode()).hexdigest()


Openers = Callable[[CommitRef], Iterable[Callable[[], Source]]]
"""The ways to open one commit, best first, each asked for when those before it have failed; every rank has as many."""


def restore_newest(
    root: Root,
    files: Files,
    port: Coordinator,
    request: RestoreRequest,
    number: int,
    step: int | None = None,
    *,
    openers: Openers | None = None,
) -> Restored | None:
    """Fill the state from the newest commit that verifies, or from ``step``.

    ``openers``: how a commit is opened; default: beneath ``root``, whose bytes are ``files``.
    None when no checkpoint exists at all.  Raises `NotFound` (no such step), `StateMismatch` (nothing was changed),
    `Damaged` (some exist, none is good, nothing was changed) or `RestoreIncomplete` (damage showed while filling and no
    other copy is left).
    """
    turn = _Round(port, request, number)
    candidates = _agreed_candidates(turn, root, step)
    passed_over: list[tuple[int, str]] = []
    for ref in (CommitRef(*candidate) for candidate in candidates):
        ways: Iterable[Callable[[], Source]]
        ways = openers(ref) if openers is not None else [partial(open_commit, root, ref, files)]
        problem = ""
        for way in ways:
            try:
                told = _try_commit(turn, way)
            except StateMismatch as mismatch:
                if not request.touched:
                    raise
                told = "; ".join(mismatch.problems[:4])  # half filled from a newer one, this is no way out
            if told is None:
                return Restored(ref, tuple(passed_over))
            problem = told
        log.warning("step %d cannot be restored: %s", ref.step, problem)
        passed_over.append((ref.step, problem))
    if not candidates:
        return None
    told = "; ".join(f"step {at}: {why}" for at, why in passed_over)
    if turn.request.touched:
        raise RestoreIncomplete(f"{files.root}: damage showed while filling and no good copy is left ({told})")
    raise Damaged(f"{files.root}: checkpoints exist and none is good ({told}); nothing was changed")


def restore_from(source: Source, port: Coordinator, request: RestoreRequest, number: int) -> Restored:
    """Fill the state from one source, ours or foreign.  Raises like `restore_newest`."""
    turn = _Round(port, request, number)
    problem = _try_commit(turn, lambda: source)
    if problem is not None:
        kind = RestoreIncomplete if turn.request.touched else Damaged
        raise kind(f"{source.files.root}: {problem}")
    return Restored(CommitRef(source.step or 0, 0, 0))


def _agreed_candidates(turn: _Round, root: Root, step: int | None) -> list[list[int]]:
    error: CheckpointError | None = None
    found: list[list[int]] | str | None = None
    try:
        found = _candidates(root, turn.port, step)
    except CheckpointError as refused:  # an unreadable root: the other ranks must hear of it
        error, found = refused, f"rank 0 cannot read the history of {root.path}: {refused}"
    agreed = turn.vote(found)[0]
    if error is not None:
        raise error
    if isinstance(agreed, str):
        raise NotFound(agreed)
    return list(agreed)


def _candidates(root: Root, port: Coordinator, step: int | None) -> list[list[int]] | str | None:
    if port.rank != 0:
        return None
    visible = root.history.visible()
    if step is not None:
        known = sorted({ref.step for ref in visible})
        visible = [ref for ref in visible if ref.step == step]
        if not visible:
            told = ", ".join(map(str, known[-10:])) or "none"
            return f"{root.path}: no committed step {step}; committed steps: {told}"
    return [[ref.step, ref.attempt, ref.save] for ref in reversed(visible)]


def _try_commit(turn: _Round, open_source: Callable[[], Source]) -> str | None:
    """Fill from one source on all ranks.  None: done; else why all ranks must take another one."""
    with no_collection() as collect_again:  # a plan is a few objects per tensor, and they all stay until its end
        return _planned_and_filled(turn, open_source, collect_again)


def _planned_and_filled(
    turn: _Round, open_source: Callable[[], Source], collect_again: Callable[[], None]
) -> str | None:
    source: Source | None = None
    filling: Filling | None = None
    fill: Fill | None = None
    problems: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    error: CheckpointError | None = None
    try:
        source = open_source()
        filling = _prepare(turn, source)
        unused = filling.unused
        if filling.trials:
            Fill(source, filling.trials).run()
            filling.try_out()
        fill = Fill(source, filling.targets, shared=turn.port.world > 1)
    except StateMismatch as mismatch:
        problems = mismatch.problems or (str(mismatch),)
        unused = mismatch.unused if isinstance(mismatch, Differences) else ()
    except UnsupportedValue as refused:
        problems = (str(refused),)
    except BAD_COPY as found:
        error = found
    told = turn.all_good(error, source)
    if told is not None:
        return told
    strict = turn.request.strict and turn.request.names is None
    _raise_mismatch(turn, problems, unused if strict else ())
    assert filling is not None and fill is not None
    fence.before_any_update()  # other checkpointers may be capturing the memory that is filled now
    turn.request.touched = True
    if not isinstance(source, NativeSource) or source.files.local_path("") is None:
        collect_again()  # such reading may take long, and makes garbage of its own
    try:
        fill.run()
    except BAD_COPY as found:
        error = found
    except Exception as found:
        if turn.port.world == 1:
            raise
        error = Damaged(f"filling failed: {type(found).__name__}: {found}")  # the other ranks must hear of it
    told = turn.all_good(error)
    if told is None:
        _finish(turn, filling)
    return told


def _prepare(turn: _Round, source: Source) -> Filling:
    request, world = turn.request, turn.port.world
    saved = saved_state(source, turn.port, request.on_world_change)
    try:
        return prepare(
            request.state,
            saved,
            names=request.names,
            strict=request.strict,
            random=request.random,
            alone=world == 1,
            on_missing_rank="keep" if request.on_world_change == "derive" else "problem",
        )
    except NotFound as nothing:  # what was asked for is not in it: no copy is better, and none is bad
        raise StateMismatch(str(nothing), (str(nothing),)) from nothing


def _finish(turn: _Round, filling: Filling) -> None:
    """Hand the filled state over on all ranks, or on none."""
    error: CheckpointError | None = None
    try:
        filling.commit()
    except CheckpointError as refused:
        error = refused
    told = turn.all_good(error)
    if told is not None:
        raise error if error is not None else RestoreIncomplete(f"another rank could not take its state: {told}")


def _raise_mismatch(turn: _Round, problems: tuple[str, ...], unused: tuple[str, ...]) -> None:
    """Raise one `StateMismatch` on all ranks when any has a problem; nothing has been changed.

    What the checkpoint has beyond the live state is a problem only where no rank uses it.
    """
    votes = turn.vote([list(problems), list(unused)])
    world = len(votes)
    found: dict[str, list[int]] = {}
    for rank, (told, _) in enumerate(votes):
        for problem in told:
            found.setdefault(problem, []).append(rank)
    lines = [
        problem if len(ranks) == world else f"{problem} (ranks {', '.join(map(str, ranks[:8]))})"
        for problem, ranks in found.items()
    ]
    nobodys = set(votes[0][1]).intersection(*(set(left) for _, left in votes[1:]))
    lines += [f"{name}: in the checkpoint, not in the live state" for name in votes[0][1] if name in nobodys]
    if not lines:
        return
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    many = "1 difference" if len(lines) == 1 else f"{len(lines)} differences"
    raise StateMismatch(
        f"the state does not fit the checkpoint, nothing was changed ({many}): "
        + "; ".join(lines[:_SHOWN])
        + more
        + "; pass strict=False to leave out what is missing or extra, or names= to restore a part",
        tuple(lines),
    )


def saved_state(source: Source, port: Coordinator, on_world_change: WorldPolicy) -> SavedState:
    """What a source offers to a restore on this rank."""
    aliases = source.aliases()
    if isinstance(source, NativeSource):
        records = source.manifest.tensors
        tensors = {record.name: (record.dtype, record.shape) for record in records}
        mine = _rank_values(source, port, on_world_change)
        digests = {record.name: record.crc for record in records}
        native = source.encoded_values()
        offered = with_groups(source.values() or {}) if native is None else None
        return SavedState(tensors, aliases, native, mine, digests, numbered_groups(tensors, offered), offered)
    tensors = {}
    for name in source.names():
        if name not in aliases:
            tensor = source.tensor(name)
            tensors[name] = (tensor.dtype, tensor.shape)
    encoded: Any = source.encoded_values() if isinstance(source, HoldsEncodedValues) else None
    values = with_groups(source.values() or {}) if encoded is None else None
    numbered = numbered_groups(tensors, values)
    return SavedState(tensors=tensors, aliases=aliases, values=encoded, numbered=numbered, offered=values)


def _rank_values(source: NativeSource, port: Coordinator, policy: WorldPolicy) -> Any:
    """This rank's own values; what `policy` makes of them where the number of ranks is another than at the save."""
    saved, world, rank = source.manifest.world, port.world, port.rank
    if saved == world:
        return source.rank_values(rank)
    first = source.rank_values(0)
    if policy == "fail" and (first.get("values") or first.get("random")):
        told = f"world: saved by {saved} ranks, restored on {world}, and on_world_change is 'fail'"
        raise StateMismatch(told, (told,))
    if policy == "exact":
        if rank >= saved:
            told = f"world: saved by {saved} ranks; there are no values and random streams of its own for rank {rank}"
            raise StateMismatch(told, (told,))
        return source.rank_values(rank)
    values = dict(source.rank_values(rank) if rank < saved else {**first, "values": {}})
    if values.get("random"):
        values["random"] = streams.derive([first["random"]], rank, world)
    return values
