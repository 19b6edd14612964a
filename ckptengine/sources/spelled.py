r"""A live state's own checkpoint under the names that other formats have: keys joined with dots, nothing escaped.

``{"model": model.state_dict()}`` is stored as ``model.layers\.0\.weight``, because a key with dots is not a nesting of
dicts; for every other tool that is ``model.layers.0.weight``.  An optimizer's state dict is presented as elsewhere:
``optim.state.<parameter>.<state>`` as ``optim.<parameter>.<state>``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckptengine.errors import CheckpointError, NotFound
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.optimizers import optimizers_in
from ckptengine.sources.port import HoldsEncodedValues, Source, Verifying
from ckptengine.sources.wrapping import Wrapping, WrappingVerifying
from ckptengine.state import names as canonical

STATE = ".state."


def is_escaped(name: str) -> bool:
    """Whether a canonical name differs from what other formats call the tensor."""
    return "\\" in name


def plain_names(names: Iterable[str], optimizers: Iterable[str]) -> dict[str, str]:
    """Canonical -> plain names, of those that differ; states of ``optimizers`` (their prefixes) lose their ``state``.

    Names that would become equal stay as they are.
    """
    states = [f"{prefix}{STATE}" for prefix in optimizers]
    made: dict[str, str] = {}
    for name in names:
        made[name] = canonical.plain(name)
        for state in states:
            if made[name].startswith(state):
                made[name] = f"{state[: -len(STATE)]}.{made[name][len(state) :]}"
                break
    counts = Counter(made.values())
    return {name: plain for name, plain in made.items() if name != plain and counts[plain] == 1}


def is_live(source: Source) -> bool:
    """Whether a source holds a live state as this package saved it; elsewhere names are as they were found."""
    return isinstance(source, HoldsEncodedValues) and source.encoded_values() is not None


def spelled(source: Source) -> Source:
    """``source`` under plain names where it holds a live state with escaped ones, else itself."""
    if not any(map(is_escaped, source.names())) or not is_live(source):
        return source
    optimizers = [optimizer.name for optimizer in optimizers_in(source.values())]
    renamed = plain_names(source.names(), optimizers)
    if not renamed:
        return source
    return _VerifyingSpelled(source, renamed) if isinstance(source, Verifying) else _Spelled(source, renamed)


class _Spelled(Wrapping):
    """See `Source` and `HoldsEncodedValues`."""

    def __init__(self, base: Source, renamed: Mapping[str, str]) -> None:
        super().__init__(base)
        self._renamed = renamed
        self._origins = {renamed.get(name, name): name for name in base.names()}

    def names(self) -> Sequence[str]:
        return list(self._origins)

    def tensor(self, name: str) -> LogicalTensor:
        origin = self._origins.get(name)
        if origin is None:
            raise NotFound(f"{self._base.files.root} has no tensor {name!r}")
        return replace(self._base.tensor(origin), name=name)

    def aliases(self) -> Mapping[str, str]:
        return {self._renamed.get(a, a): self._renamed.get(b, b) for a, b in self._base.aliases().items()}

    def values(self) -> object:
        return self._base.values()

    def encoded_values(self) -> object:
        assert isinstance(self._base, HoldsEncodedValues)
        return self._base.encoded_values()

    def path(self, name: str) -> tuple[object, ...] | None:
        """The keys that lead to a tensor whose name says so: one in which something was escaped."""
        origin = self._origins.get(name, "")
        if not is_escaped(origin):
            return None
        try:
            return canonical.split(origin)
        except CheckpointError:
            return None


class _VerifyingSpelled(_Spelled, WrappingVerifying):
    """Of a source whose files carry checksums."""
