"""What a conversion reads: headers of a source's tensors, and their bytes box by box or many small ones at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.operations.read import BoxReader
from ckptengine.sources.direct import DirectReads
from ckptengine.sources.port import Source, Verifying
from ckptengine.sources.writer import Wanted

CACHED_PIECES = 1 << 18
"""Headers are kept until they have this many fragments: a plan walks over all tensors many times."""

CACHED_READERS = 4096
"""Tensors whose readers are kept; few need one again."""


class SourceTensors:
    """Headers and readers of a source's tensors; the most recent ones are kept."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._direct = DirectReads(source.files)
        self._verifying = isinstance(source, Verifying)
        self._headers: OrderedDict[str, LogicalTensor] = OrderedDict()
        self._pieces = 0
        self._readers: OrderedDict[str, BoxReader] = OrderedDict()

    def tensor(self, name: str) -> LogicalTensor:
        """The header of a tensor."""
        found = self._headers.get(name)  # atomic by itself, and asked for a dozen times for each tensor
        if found is not None:
            return found
        with self._lock:
            found = self._headers.get(name)
            if found is None:
                found = self._headers[name] = self._source.tensor(name)
                self._pieces += 1 + len(found.fragments)
                while self._pieces > CACHED_PIECES and len(self._headers) > 1:
                    self._pieces -= 1 + len(self._headers.popitem(last=False)[1].fragments)
            return found

    def _reader(self, name: str, tensor: LogicalTensor) -> BoxReader:
        with self._lock:
            reader = self._readers.get(name)
            if reader is None:
                # What the whole tensor's digest will be compared with need not be verified range by range too.
                checked = tensor.digest is None and self._verifying
                reader = BoxReader(self._source, tensor, read_into=None if checked else self._direct.read_into)
                self._readers[name] = reader
                while len(self._readers) > CACHED_READERS:
                    self._readers.popitem(last=False)
            else:
                self._readers.move_to_end(name)
            return reader

    def read(self, name: str, box: Box, out: Any) -> None:
        """Fill ``out`` with a box of a tensor, see `Job.read`."""
        tensor = self.tensor(name)
        if isinstance(out, memoryview) and self._plain(tensor, box) and out.nbytes == tensor.nbytes:
            first = tensor.fragments[0]
            self._direct.read_into(first.file, first.offset, out)
            return
        self._reader(name, tensor).read(box, out, workers=1)

    def read_many(self, wanted: Sequence[Wanted]) -> None:
        """`read` of many, in the order in which they lie in their files; neighbours are read together."""
        files: dict[str, list[tuple[int, memoryview]]] = {}
        for name, box, view in wanted:
            tensor = self.tensor(name)
            if self._plain(tensor, box) and view.nbytes == tensor.nbytes:
                first = tensor.fragments[0]
                files.setdefault(first.file, []).append((first.offset, view))
            else:
                self.read(name, box, view)
        for file, ranges in files.items():
            ranges.sort(key=lambda one: one[0])
            self._direct.read_many(file, ranges)

    def _plain(self, tensor: LogicalTensor, box: Box) -> bool:
        """Whether a box is a whole tensor in one run: of a hundred thousand small ones, planning costs most."""
        if box.shape != tensor.shape or (self._verifying and tensor.digest is None) or not box.size:
            return False
        return len(tensor.fragments) == 1 and tensor.fragments[0].is_contiguous and tensor.fragments[0].box == box
