"""What has been sent of one file: an append-only log beside it, from which the next process goes on.

One line of JSON for each fact, in the order in which they came true.  A line torn by a kill ends the log; a lost one
costs sending a part again.  Nothing is believed because it is written here: what counts is the digest on arrival.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptengine.store.files import guarded, storage_failed
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.port import Receipt, TierPort

log = logging.getLogger("ckptengine")


@dataclass(slots=True)
class Sent:
    """How far one upload has come: ``crcs`` are the raw CRCs of the parts that ``receipts`` are for."""

    token: str = ""
    part_bytes: int = 0
    receipts: dict[int, Receipt] = field(default_factory=dict)
    crcs: dict[int, int] = field(default_factory=dict)
    verified: bool = False


class ProgressLog:
    """The log of one file on its way to one target; without a path it remembers nothing."""

    def __init__(self, path: Path | None, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def load(self) -> Sent:
        """What earlier processes recorded, as far as it can be read and fits the file."""
        sent = Sent()
        for fact in self._facts():
            kind = fact.get("is")
            if kind == "begun" and fact.get("size_bytes") == self._size_bytes:
                sent = Sent(token=str(fact["token"]), part_bytes=int(fact["part_bytes"]))
            elif kind == "part" and sent.part_bytes:
                part = int(fact["part"])
                sent.receipts[part] = Receipt(str(fact["tag"]), bool(fact["proven"]))
                sent.crcs[part] = int(fact["crc"], 16)
            elif kind == "verified" and fact.get("size_bytes") == self._size_bytes:
                sent.verified = True
        return sent

    def _facts(self) -> list[dict[str, Any]]:
        if self._path is None:
            return []
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        facts = []
        for line in lines:
            check, _, body = line.partition(b" ")
            if check != b"%08x" % zlib.crc32(body):
                break
            fact = json.loads(body)
            facts.append(fact)
        return facts

    def begun(self, token: str, part_bytes: int) -> None:
        self.forget()
        self._append({"is": "begun", "token": token, "part_bytes": part_bytes, "size_bytes": self._size_bytes})

    def part(self, part: int, crc: int, receipt: Receipt) -> None:
        self._append({"is": "part", "part": part, "crc": f"{crc:016x}", "tag": receipt.tag, "proven": receipt.proven})

    def verified(self) -> None:
        """The object is on the target, published, and was found equal there."""
        self._append({"is": "verified", "size_bytes": self._size_bytes})

    def forget(self) -> None:
        if self._path is not None:
            path = self._path
            guarded("remove", path, lambda: path.unlink(missing_ok=True))

    def _append(self, fact: dict[str, Any]) -> None:
        if self._path is None:
            return
        body = json.dumps(fact, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)
        except OSError as refusal:
            # A full disk here must not keep a checkpoint from reaching a safer place.
            log.warning("%s; this drain goes on, but could not be resumed", storage_failed("note", self._path, refusal))
            self._path = None


def progress_log(source: TierPort, target: TierPort, name: str, size_bytes: int) -> ProgressLog:
    """The log for carrying ``name`` to ``target``, hidden beside the file; none where the source is not a directory."""
    if not isinstance(source, LocalTier):
        return ProgressLog(None, size_bytes)
    path = source.local_path(name)
    return ProgressLog(path.with_name(f".drain-{zlib.crc32(target.label.encode()):08x}-{path.name}.log"), size_bytes)
