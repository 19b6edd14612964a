from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import UnreadableFormat
from ckptengine.state import names
from ckptengine.state.names import RankMark, TypedKey

components = st.one_of(
    st.text(st.characters(codec=None)),
    st.integers(-(10**6), 10**6),
    st.builds(TypedKey, st.text()),
    st.builds(RankMark, st.integers(0, 99)),
)


@given(st.lists(components, min_size=1))
def test_a_name_gives_its_path_back(path):
    name = names.make(*path)
    assert names.split(name) == tuple(path)
    name.encode("utf-8")


@given(st.lists(components, min_size=1), st.lists(components, min_size=1))
def test_different_paths_have_different_names(a, b):
    assert (names.make(*a) == names.make(*b)) == (a == b)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("model", "layers", "0", "weight"), "model.layers.0.weight"),
        (("a.b",), r"a\.b"),
        (("a", "b"), "a.b"),
        ((0,), r"\#0"),
        ((-3, "0"), r"\#-3.0"),
        (("",), r"\e"),
        (("a\\",), "a\\\\"),
        (("a|b",), "a|b"),
        (("\ud800",), r"\uD800"),
    ],
)
def test_names_are_what_the_format_says(path, name):
    assert names.make(*path) == name


@pytest.mark.parametrize("name", ["a..b", ".a", "a.", "\\", "a\\x", "\\#x", "\\@-1", "a\\#1", "\\ea", "\\uD80", "\\#"])
def test_malformed_names_are_refused(name):
    with pytest.raises(UnreadableFormat, match="malformed name"):
        names.split(name)
