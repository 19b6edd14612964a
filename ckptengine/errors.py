"""The tree of errors.

Grouped by what the caller would do about them::

    CheckpointError
    |-- UnusableRequest       change the call: nothing was touched
    |   |-- NotFound              no such checkpoint, step, tensor or file
    |   |-- UnreadableFormat      not a checkpoint that this version reads
    |   |-- StateMismatch         the live state does not fit the checkpoint (all differences in one report)
    |   |-- UnsupportedValue      a value that has no typed encoding (names the path in the state)
    |   |-- LayoutError           fragments that overlap, leave a gap or disagree with the shape
    |   `-- RuleError             a rule that matches nothing, clashes, or does not explain a shape
    |-- Damaged                 the bytes at rest are wrong: take another copy or an older step
    |   |-- DigestMismatch        bytes that do not match their digest
    |   |-- Truncated             a file that is shorter than its record says
    |   |-- ForeignFile           a file that belongs to another rank, step or attempt
    |   `-- RestoreIncomplete     damage while filling and no good copy left: the live state is unusable
    |-- SaveFailed              this checkpoint does not exist; the ones before it do
    |   |-- StorageFailed         the operating system refused a read, a write or a flush (disk full, I/O error)
    |   |-- TornCapture           a tensor changed while it was being captured
    |   |-- ReplicasDiffer        ranks that must hold equal values do not
    |   `-- Stalled               the stall budget ran out
    |-- Conflict                somebody else owns the root, or newer work supersedes this one
    |   |-- RootInUse             another live job holds the root
    |   |-- Superseded            a newer attempt took over; this one may not commit
    |   `-- AlreadyExists         the target of a conversion exists
    `-- CoordinationFailed      other ranks died, hang, or disagree
        |-- RankTimeout           a rank did not answer in time
        `-- RanksDisagree         ranks made different calls

Every class has a stable ``code``; codes are only ever added (a test freezes them).  A message says what failed, on
what, why, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class CheckpointError(Exception):
    """Root of every error that ckptengine raises on purpose."""

    code: ClassVar[str] = "checkpoint"


class UnusableRequest(CheckpointError):
    """The call cannot be carried out as made; nothing was changed."""

    code = "unusable-request"


class NotFound(UnusableRequest):
    """A checkpoint, step, tensor or file that does not exist."""

    code = "not-found"


class UnreadableFormat(UnusableRequest):
    """Not a checkpoint, or one that this version cannot read."""

    code = "unreadable-format"


class StateMismatch(UnusableRequest):
    """The live state does not fit the checkpoint; ``problems`` lists every difference."""

    code = "state-mismatch"

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class UnsupportedValue(UnusableRequest):
    """A value in the state that has no typed encoding."""

    code = "unsupported-value"


class LayoutError(UnusableRequest):
    """Fragments or shardings that do not describe a tensor exactly once."""

    code = "layout"


class RuleError(UnusableRequest):
    """A rule file that does not explain the checkpoint it is applied to."""

    code = "rule"


class Damaged(CheckpointError):
    """Bytes at rest that are not what was written."""

    code = "damaged"


class DigestMismatch(Damaged):
    """Bytes that do not match their digest."""

    code = "digest-mismatch"


class Truncated(Damaged):
    """A file that ends before its record says."""

    code = "truncated"


class ForeignFile(Damaged):
    """A file that belongs to another rank, step, attempt or run."""

    code = "foreign-file"


class RestoreIncomplete(Damaged):
    """Damage was met while filling and no good copy was left; the live state must not be used."""

    code = "restore-incomplete"


class SaveFailed(CheckpointError):
    """This checkpoint was not committed; earlier ones are untouched."""

    code = "save-failed"


class StorageFailed(SaveFailed):
    """The operating system refused a file operation."""

    code = "storage-failed"


class TornCapture(SaveFailed):
    """A tensor changed while it was being captured."""

    code = "torn-capture"


class ReplicasDiffer(SaveFailed):
    """Ranks hold different bytes under a name that must be equal everywhere."""

    code = "replicas-differ"


class Stalled(SaveFailed):
    """A save was given up because it would have blocked training beyond its budget."""

    code = "stalled"


class Conflict(CheckpointError):
    """Somebody else owns what this call wants to change."""

    code = "conflict"


class RootInUse(Conflict):
    """Another live job holds the root."""

    code = "root-in-use"


class Superseded(Conflict):
    """A newer attempt has taken over the root; this one may not commit any more."""

    code = "superseded"


class AlreadyExists(Conflict):
    """The target exists and would have to be overwritten."""

    code = "already-exists"


class CoordinationFailed(CheckpointError):
    """The ranks could not act together."""

    code = "coordination-failed"


class RankTimeout(CoordinationFailed):
    """A rank did not answer within the configured time."""

    code = "rank-timeout"


class RanksDisagree(CoordinationFailed):
    """Ranks made calls that do not fit together."""

    code = "ranks-disagree"
