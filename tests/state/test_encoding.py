from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import fractions
import io
import json
import math
import pathlib
import random
import struct
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import UnreadableFormat, UnsupportedValue, UnusableRequest
from ckptengine.state import registry
from ckptengine.state.decoding import DECODERS, Decoder, decode, loads
from ckptengine.state.encoding import MAX_DEPTH, Encoder, dumps, encode
from ckptengine.state.registry import Opaque
from ckptengine.state.scalars import INLINE_ARRAY_BYTES

Point = namedtuple("Point", ["x", "y"])


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Named(enum.StrEnum):
    ONE = "one"


@dataclass
class Progress:
    step: int
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    inner: object = None


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.value == self.value

    __hash__ = None


def there_and_back(value):
    """Through JSON text, with the types of the live value known."""
    encoder = Encoder()
    data = loads(json.dumps(encoder.encode(value), sort_keys=True, allow_nan=False))  # sorting must not matter
    return Decoder(types=encoder.types).decode(data)


def exactly(a, b) -> bool:
    """Equality that tells 1 from True and 1.0, 0.0 from -0.0, one NaN from another, and minds order and types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return exactly(a.real, b.real) and exactly(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            exactly(k, m) and exactly(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(exactly, a, b))
    return a == b


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(codec=None)),
    st.binary(),
    st.binary().map(bytearray),
    st.dates(),
    st.datetimes(),
    st.timedeltas(),
    st.uuids(),
    st.fractions(),
)
keys = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.floats(allow_nan=False)),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text("ab.$\\|0", max_size=3), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=4).map(lambda d: defaultdict(list, d)),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
        st.sets(keys, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_values_come_back_exactly(value):
    assert exactly(there_and_back(value), value)


@settings(max_examples=100, deadline=None)
@given(values)
def test_encoding_is_deterministic_ascii_text(value):
    text = dumps(encode(value))
    assert text.isascii()
    assert dumps(encode(there_and_back(value))) == text


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63),
        10**5000,
        math.inf,
        -math.inf,
        -0.0,
        struct.unpack("<d", bytes.fromhex("01000000000af87f"))[0],
        "\ud800 lone",
        {"$": 1, "a.b": 2, "a": {"b": 3}, "a|b": 4, 0: 5, "0": 6, None: 7, (1, "x"): 8, True: 9, "": 10},
        {},
        [],
        (),
        set(),
        [[], {}, ()],
        deque([1, 2], maxlen=5),
        deque(maxlen=0),
        range(3, 11, 2),
        slice(None, 4, -1),
        pathlib.PosixPath("/a/b"),
        pathlib.PurePosixPath("a\udcff"),
        pathlib.PureWindowsPath("c:\\x"),
        torch.Size([2, 3]),
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.quint8,
        torch.device("cuda:3"),
        np.float32(1.5),
        np.int8(-3),
        np.bool_(True),
        np.str_("abc"),
        np.str_(""),
        np.bytes_(b"\0a"),
        np.complex64(1 + 2j),
        np.datetime64("2024-01-02T03:04:05"),
        np.longdouble(1.25),
        datetime.datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC, fold=1),
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
        uuid.UUID(int=5),
        Point(1, (2,)),
        Colour.RED,
        Colour.BLUE,
        Bits.A | Bits.B,
        Named.ONE,
        {Named.ONE: 1, Colour.RED: 2},
        Progress(3, [1.0]),
        Frozen("x", Frozen("y")),
        defaultdict(None, {1: 2}),
        defaultdict(Counter, {"a": Counter("aab")}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_these_values_come_back(value):
    assert exactly(there_and_back(value), value)


def test_defaultdict_keeps_its_factory():
    assert there_and_back(defaultdict(list)).default_factory is list


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.array(3.5),
        np.zeros((0, 4), np.int16),
        np.array(["a", "long"]),
        np.array([b"x", b"yz"]),
        np.array([1, 2], ">i4"),
        np.array([True, False]),
        np.arange(4, dtype=np.float16)[::-2],
        np.array(["2024-01-01"], "M8[D]"),
    ],
    ids=str,
)
def test_arrays_come_back(array):
    back = there_and_back(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.flags.writeable
    assert (back == array).all()


def test_large_arrays_are_left_to_the_leaf_hook():
    seen = []
    encoder = Encoder(lambda value, name: seen.append(name) or "hooked")
    assert encoder.encode({"big": np.zeros(INLINE_ARRAY_BYTES + 1, np.uint8)}) == {"big": "hooked"}
    assert seen == ["big"]
    assert encoder.encode(np.zeros(INLINE_ARRAY_BYTES, np.uint8))["$"] == "ndarray"


def test_generators_continue_where_they_were():
    makers = {
        "python": (random.Random(3), lambda g: g.random()),
        "numpy": (np.random.default_rng(3), lambda g: g.random()),
        "philox": (np.random.Generator(np.random.Philox(3)), lambda g: g.random()),
        "mt": (np.random.Generator(np.random.MT19937(3)), lambda g: g.random()),
        "legacy": (np.random.RandomState(3), lambda g: g.random_sample()),
        "torch": (torch.Generator().manual_seed(3), lambda g: torch.rand((), generator=g).item()),
    }
    for name, (generator, draw) in makers.items():
        draw(generator)
        if name == "python":
            generator.gauss(0, 1)
        copy = there_and_back(generator)
        assert [draw(copy) for _ in range(3)] == [draw(generator) for _ in range(3)], name


def test_bytesio():
    assert there_and_back(io.BytesIO(b"abc")).getvalue() == b"abc"


# registration


def test_unknown_types_are_refused_with_path_and_remedy():
    with pytest.raises(UnsupportedValue, match=r"'a\.b\.0'.*Custom.*register\(Custom"):
        encode({"a": {"b": [Custom(1)]}})


@pytest.mark.parametrize(
    "value", [lambda: 0, object(), open, int, (i for i in ()), (1).__add__, Custom, NotImplemented]
)
def test_unsupported(value):
    with pytest.raises(UnsupportedValue, match="'x'"):
        encode({"x": value})


def test_subclasses_of_builtins_are_not_mistaken_for_them():
    class Special(dict):
        pass

    with pytest.raises(UnsupportedValue, match="Special"):
        encode(Special())


def test_a_registered_type_comes_back_and_is_inert_where_it_is_not_registered(monkeypatch):
    monkeypatch.setattr(registry, "_CODECS", {})
    monkeypatch.setattr(registry, "_CODECS_BY_NAME", {})
    registry.register(Custom, encode=lambda c: {"value": c.value}, decode=lambda d: Custom(d["value"]), name="custom")
    data = encode([Custom(5)])
    assert decode(data) == [Custom(5)]
    registry._CODECS_BY_NAME.clear()
    assert decode(data) == [Opaque("custom", {"value": 5})]


def test_reading_without_the_type_gives_an_inert_placeholder():
    decoder = Decoder()
    got = decoder.decode(encode({"p": Progress(1), "c": Colour.RED, "n": Point(1, 2), Colour.BLUE: 0}))
    name = f"{__name__}:"
    assert got["p"] == Opaque(name + "Progress", {"step": 1, "history": []})
    assert got["c"] == Opaque(name + "Colour", {"name": "RED", "value": 1})
    assert got["n"] == Opaque(name + "Point", {"x": 1, "y": 2})
    assert decoder.unknown_types == {name + "Progress", name + "Colour", name + "Point"}


def test_reading_runs_nothing(monkeypatch):
    @dataclass
    class Loud:
        x: int

        def __post_init__(self) -> None:
            raise AssertionError("was run")

    quiet = object.__new__(Loud)
    quiet.x = 1
    assert there_and_back(quiet).x == 1
    monkeypatch.setitem(__import__("sys").modules, "not_a_module", None)
    assert isinstance(decode({"$": "dataclass", "type": "os:system", "fields": {"command": "x"}}), Opaque)


def test_register_refuses_half_a_codec_and_clashes(monkeypatch):
    monkeypatch.setattr(registry, "_CODECS", {})
    monkeypatch.setattr(registry, "_CODECS_BY_NAME", {})
    monkeypatch.setattr(registry, "_TYPES", {})
    with pytest.raises(UnusableRequest, match="both"):
        registry.register(Custom, encode=repr)
    with pytest.raises(UnusableRequest, match="only dataclasses"):
        registry.register(Custom)
    registry.register(Progress, name="mine")
    with pytest.raises(UnusableRequest, match="belongs to"):
        registry.register(Frozen, name="mine")
    assert decode(encode(Progress(2))) == Progress(2)


def test_failing_codecs_are_named(monkeypatch):
    monkeypatch.setattr(registry, "_CODECS", {})
    monkeypatch.setattr(registry, "_CODECS_BY_NAME", {})
    registry.register(Custom, encode=lambda c: c.missing, decode=lambda d: d)
    with pytest.raises(UnsupportedValue, match=r"codec of .*Custom failed"):
        encode(Custom(1))


def test_a_changed_enum_and_dataclass_are_refused():
    name = f"{__name__}:"
    with pytest.raises(UnreadableFormat, match="no member 'GREEN'"):
        decode({"$": "enum", "type": name + "Colour", "name": "GREEN", "value": 9}, {name + "Colour": Colour})
    with pytest.raises(UnreadableFormat, match="no longer has the fields"):
        decode({"$": "dataclass", "type": name + "Progress", "fields": {"gone": 1}}, {name + "Progress": Progress})


# bounds


def test_cycles_and_depth_are_refused():
    loop: list[object] = []
    loop.append({"self": loop})
    with pytest.raises(UnsupportedValue, match=r"'x\.0\.self' contains itself"):
        encode({"x": loop})
    deep: object = 0
    for _ in range(MAX_DEPTH):
        deep = (deep,)
    assert there_and_back(deep) == deep
    with pytest.raises(UnsupportedValue, match="levels deep"):
        encode([deep])


def test_the_same_object_twice_is_no_cycle():
    part = [1]
    assert there_and_back([part, part, (part, part)]) == [[1], [1], ([1], [1])]


@pytest.mark.parametrize(
    "data",
    [
        {"$": "nonsense"},
        {"$": 5},
        {"$": ["list"]},
        {"$": "tuple"},
        {"$": "tuple", "v": {}},
        {"$": "int", "v": "zz"},
        {"$": "float", "v": "00"},
        {"$": "complex", "v": "xx"},
        {"$": "bytes", "v": "*"},
        {"$": "bytes", "v": 5},
        {"$": "str", "v": "/w=="},
        {"$": "set", "v": [[1]]},
        {"$": "dict", "items": [[1, 2], [1, 3]]},
        {"$": "dict", "items": [[[1], 2]]},
        {"$": "dict", "items": [[1, 2, 3]]},
        {"$": "dict", "items": 5},
        {"$": "defaultdict", "factory": "eval", "items": {}},
        {"$": "deque", "v": [], "maxlen": -1},
        {"$": "deque", "v": [], "maxlen": 1 << 70},
        {"$": "range", "v": [0, 1, 0]},
        {"$": "ndarray", "dtype": "O", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "V8", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "<f8", "shape": [1 << 60, 1 << 60], "v": ""},
        {"$": "ndarray", "dtype": "<f8", "shape": [2], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "<f8", "shape": [-1], "v": "AAAAAAAAAAA="},
        {"$": "numpy", "dtype": "<f8", "v": "AA=="},
        {"$": "torch.dtype", "v": "nn"},
        {"$": "torch.device", "v": "toaster"},
        {"$": "torch.Size", "v": ["a"]},
        {"$": "torch.Generator", "device": "cpu", "v": "AAAA"},
        {"$": "random.Random", "v": {"version": 3, "words": "AAAA", "gauss": None}},
        {"$": "numpy.random", "kind": "Generator", "v": {"bit_generator": "eval"}},
        {"$": "path", "kind": "Path", "v": "x"},
        {"$": "datetime", "v": "yesterday", "fold": 0},
        {"$": "timedelta", "v": [1 << 90]},
        {"$": "enum", "type": 5, "name": "x", "value": 1},
        {"$": "dataclass", "type": "a:b", "fields": []},
        {"$": "decimal", "v": "x"},
        {"$": "uuid", "v": "x"},
        {"$": "fraction", "v": [1, 0]},
    ],
    ids=lambda data: dumps(data)[:50],
)
def test_hostile_data_is_refused(data):
    with pytest.raises(UnreadableFormat):
        decode(data)


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["v", "items", "type", "fields", "dtype", "shape", "name", "a"]), inner)
    | st.builds(lambda tag, parts: {"$": tag, **parts}, st.sampled_from(sorted(DECODERS)),
                st.dictionaries(st.sampled_from(["v", "items", "type", "fields", "dtype", "shape", "kind"]), inner)),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(json_data)
def test_any_json_is_read_or_refused(data):
    with contextlib.suppress(UnreadableFormat):
        dumps(encode(decode(data)))


def test_depth_of_hostile_text_is_bounded():
    with pytest.raises(UnreadableFormat, match="levels deep"):
        decode(loads("[" * 400 + "]" * 400))
    with pytest.raises(UnreadableFormat, match="not JSON"):
        loads("[" * 200000)
    with pytest.raises(UnreadableFormat, match="not JSON"):
        loads("NaN")
    with pytest.raises(UnreadableFormat, match="not JSON"):
        loads(b"\xff\xfe\xfa")
    with pytest.raises(UnreadableFormat, match="not JSON"):
        loads("1" * 5000)
