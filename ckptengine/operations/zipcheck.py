"""Files of torch.save against the CRC-32 that each of their records has: torch does not look at them when it loads."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterator, Sequence

from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.files import INLINE
from ckptengine.sources.port import HoldsZips, Source
from ckptengine.sources.torchzip import TorchZip, is_torch_file

Progress = Callable[[int, int], None]


class ZipCheck:
    """The zips in which a source's tensors lie: whole files, and those inside of larger ones that it knows of.

    ``known``: files of which all is checked in another way.
    """

    def __init__(self, source: Source, fragments: Sequence[Fragment], known: Collection[str] = ()) -> None:
        self._files = source.files
        self._known = known
        inside = source.zips() if isinstance(source, HoldsZips) else ()
        self._places = [place for place in inside if place[0] not in known]
        larger = {path for path, _, _ in self._places}
        for path in sorted({fragment.file for fragment in fragments if _is_of_a_file(fragment)} - larger):
            if path not in known and is_torch_file(self._files, path):
                self._places.append((path, 0, self._files.size(path)))
        self._checked: dict[str, list[tuple[int, int]]] = {}

    def run(self, progress: Progress | None) -> Iterator[CheckpointError]:
        """Check everything, one zip at a time; what is damaged."""
        done, total = 0, sum(nbytes for _, _, nbytes in self._places)

        def read(count: int) -> None:
            if progress is not None:
                progress(min(done + count, total), total)

        for path, offset, nbytes in self._places:
            try:
                found = TorchZip(self._files, path, offset, nbytes)
            except UnreadableFormat:
                continue  # torch's format before 1.6, or a zip of something else
            except CheckpointError as error:
                yield error
                continue
            if found.has_checksums:
                yield from found.damaged_records(read)
                self._checked.setdefault(path, []).append((offset, nbytes))
            done += nbytes
        for places in self._checked.values():
            places.sort()

    def covers(self, fragment: Fragment) -> bool:
        """Whether a fragment lies in what has been checked, or in none of the files."""
        if fragment.file in self._known or not _is_of_a_file(fragment):
            return True
        places = self._checked.get(fragment.file, [])
        at = bisect.bisect_right(places, (fragment.offset, math.inf)) - 1
        return at >= 0 and fragment.offset < sum(places[at])


def _is_of_a_file(fragment: Fragment) -> bool:
    """Not empty, and no number that the source found among its values when it was opened."""
    return bool(fragment.file) and INLINE not in fragment.file
