"""Convert any checkpoint to any format: plan, write unit by unit, prove by digests that nothing was lost, commit.

Memory is bounded, each source byte is read once and each target byte written once.  A killed conversion goes on when
the same one is started again; a failed one leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import DigestMismatch, RuleError, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.operations.converting.on_dask import run_on_dask
from ckptengine.operations.converting.plan import Plan, Planned, make_plan
from ckptengine.operations.converting.run import Outcome, Progress, finish, run_units
from ckptengine.operations.converting.workspace import open_workspace
from ckptengine.operations.digests import digest_of
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import BoxReader
from ckptengine.sources.port import Source
from ckptengine.sources.writer import Layout, Unit
from ckptengine.state.collection import no_collection
from ckptengine.tiers.redact import redacted_url

Path = str | os.PathLike[str]


class TargetDiffers(DigestMismatch):
    """What ``verify`` read back from a committed target is not what was converted."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count`` of a conversion that several processes share."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``I/N`` with I from 0 to N - 1, as job arrays count; `UnusableRequest` for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 0 <= int(index) < int(count)):
            raise UnusableRequest(f"{text!r} is no shard; write I/N with I from 0 to N-1, like 0/8")
        return cls(int(index), int(count))

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """The units of this part: every N-th from the largest down, so that parts take about as long."""
        by_size = sorted(units, key=lambda unit: (-unit.read_bytes, unit.key))
        return by_size[self.index :: self.count]


def convert(
    source: Path | Source,
    target: Path,
    *,
    to: str,
    layout: Layout | str | None = None,
    rules: Path | None = None,
    dry_run: bool = False,
    verify: bool = False,
    step: int | None = None,
    memory_bytes: int = 1 << 30,
    workers: int | None = None,
    shard: Shard | str | None = None,
    dask: str | None = None,
    options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Convert a checkpoint; returns what was done, or with ``dry_run`` what would be.

    ``to`` is one of `ckptengine.operations.converting.plan.FORMATS`; ``layout`` the parallel layout of formats that
    have one; ``rules`` a rule file or preset for sources and targets that need it; ``options`` the format's own.
    ``verify`` reads the target again.  ``shard`` does one part of the work of a job array: the last part that ends
    commits.  ``dask`` is the address of a scheduler whose workers see both source and target.

    Raises `AlreadyExists` where the target exists, `DigestMismatch` where the source's bytes are not those that its
    digests were made of (its subclass `TargetDiffers` where ``verify`` finds that of the target), `StorageFailed`
    where the storage refuses, and everything that opening the source raises.
    The target exists if and only if this returns a plan whose state is ``"committed"``, or raises `TargetDiffers`.
    """
    shown = os.fspath(target)
    opened = open_any(source, step, rules) if isinstance(source, str | os.PathLike) else source
    parsed = Layout.parse(layout) if isinstance(layout, str) else layout
    part = Shard.parse(shard) if isinstance(shard, str) else shard or Shard()
    with no_collection():
        planned = make_plan(
            opened,
            shown,
            to=to,
            layout=parsed,
            rules=rules,
            memory_bytes=memory_bytes,
            workers=workers,
            options=options,
        )
    if dry_run:
        return planned.plan
    if dask is not None:
        if not isinstance(source, str | os.PathLike) or part.count != 1:
            raise UnusableRequest("conversion on dask needs the source's path, and no shard")
        remote = {"source": os.fspath(source), "step": step, "rules": None if rules is None else os.fspath(rules)}
        compared = run_on_dask(planned, shown, remote, dask, progress)
    else:
        compared = _run_here(planned, shown, part, progress)
    if compared is None:
        return dataclasses.replace(planned.plan, state="waiting")
    plan = _verify(planned, shown, compared[1], rules) if verify else planned.plan
    return dataclasses.replace(plan, state="committed", compared=compared[0])


def _run_here(planned: Planned, target: str, part: Shard, progress: Progress | None) -> Outcome | None:
    """Do one part with threads of this process; None where other parts are still missing, or nothing is left for it."""
    units = part.of(planned.units)
    if part.index and not units:  # more parts than units; the others may have committed by now
        return None
    workspace = open_workspace(target)
    try:
        workspace.open(planned.fingerprint, f"{part.index}-{part.count}")
        try:
            run_units(planned, workspace, units, progress)
            if part.count > 1:  # the part that ends last, perhaps on another machine, commits
                workspace.settle(unit.key for unit in units)
            return finish(planned, workspace, os.path.basename(target))
        except Exception:
            if part.count == 1:
                workspace.discard()
            raise
    finally:
        workspace.close()


def _verify(planned: Planned, target: str, digests: Mapping[str, str], rules: Path | None) -> Plan:
    """Read the target again and compare each tensor that it holds as it was with what was converted."""
    try:
        made = open_any(target)  # the target holds the tensors as the rules made them
    except RuleError:
        made = open_any(target, None, rules)  # a layout that is itself unreadable without rules
    job = planned.job
    names = [name for name in job.names if name not in job.aliases]
    there = set(made.names())
    wrong: list[str] = []
    verified = 0
    for name in names:
        source, tensor = job.tensor(name), made.tensor(name) if name in there else None
        if tensor is None or (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
            continue
        reader = BoxReader(made, tensor)

        def read(_: str, box: Box, out: Any, reader: BoxReader = reader) -> None:
            reader.read(box, out)

        wanted = digests.get(name) or source.digest or digest_of(source, job.read, job.chunk_bytes)
        verified += 1
        try:
            same = digest_of(tensor, read, job.chunk_bytes) == wanted
        except DigestMismatch:  # reading found it first
            same = False
        if not same:
            wrong.append(name)
    if wrong:
        raise TargetDiffers(
            f"{redacted_url(target)}: {len(wrong)} tensors read back differ from what was converted "
            f"({', '.join(wrong[:5])}); delete it, check the storage, and convert again"
        )
    return dataclasses.replace(planned.plan, verified=verified, unverified=len(names) - verified)
