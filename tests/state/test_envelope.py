"""The canonical form of documents, and that a long one is encoded to the same bytes in slices."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptengine.store.envelope import canonical, canonical_in_slices, seal, unseal

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
short = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(), inner, max_size=40), max_leaves=8
)
# Repeated, so that lists are longer than a slice, and end within one.
long = st.tuples(st.lists(short, min_size=1, max_size=3), st.integers(300, 1100)).map(lambda two: two[0] * two[1])
documents = short | long | st.lists(short | long, max_size=3) | st.dictionaries(st.text(), short | long, max_size=3)


@given(document=documents)
def test_slices_make_the_same_bytes(document: Any) -> None:
    assert canonical_in_slices(document).encode() == canonical(document)
    assert canonical_in_slices({"b": document, "a": [document]}).encode() == canonical({"b": document, "a": [document]})


@given(document=documents)
def test_what_is_sealed_comes_back(document: Any) -> None:
    assert unseal("thing", seal("thing", document), "here") == document
