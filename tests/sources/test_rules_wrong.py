"""Rule files that are wrong: each is refused, with the rule, the tensor and the reason, and none maps data wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ckptengine.errors import NotFound, RuleError
from ckptengine.sources.port import Source
from ckptengine.sources.rules.parse import load_rules, parse_rules
from ckptengine.sources.rules.present import present

from .memory import MemorySource
from .test_rules import HEAD, index_array, shown


class Tied(MemorySource):
    """Arrays of which some share the bytes of others."""

    def __init__(self, arrays: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> None:
        super().__init__({name: arrays[aliases.get(name, name)] for name in [*arrays, *aliases]})
        self._tied = aliases

    def aliases(self) -> Mapping[str, str]:
        return self._tied


def arrays() -> dict[str, np.ndarray]:
    made = {
        "model.embed": index_array(10, 4),
        "model.head": index_array(10, 4, start=100),
        "model.norm": index_array(4, start=200),
        **{f"model.l.{n}.w": index_array(12, 4, start=1000 * n) for n in range(3)},
        **{f"model.l.{n}.o": index_array(4, 8, start=9000 + 1000 * n) for n in range(3)},
        **{f"model.l.{n}.s": index_array(start=n) for n in range(3)},
    }
    for name in list(made):
        parameter = name.removeprefix("model.")
        made[f"optim.{parameter}.exp_avg"] = made[name] + 50_000
        made[f"optim.{parameter}.step"] = np.array(7)
    return made


def viewed(text: str, source: Source | None = None) -> Source:
    """All tensors under the rules, each of them made once."""
    made = present(source or MemorySource(arrays(), {}), parse_rules(HEAD + text, "wrong.toml"))
    for name in made.names():
        made.tensor(name)
    return made


def refused(text: str, *said: str, source: Source | None = None) -> None:
    with pytest.raises(RuleError) as caught:
        viewed(text, source)
    assert all(part in str(caught.value) for part in said), str(caught.value)


JOIN = (
    "[[rule]]\nmatch = 'l\\.(\\d)\\.w'\nrename = 'j{1}'\njoin = { dim = 0, part = 0, widths = [3, 2] }\n"
    "[[rule]]\nmatch = 'l\\.(\\d)\\.o'\ntranspose = true\nrename = 'j{1}'\njoin = "
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("split = { groups = 0, parts = [{ rename = 'a{1}' }, { rename = 'b{1}' }] }", "into 0 group(s)"),
        ("split = { groups = -1, parts = [{ rename = 'a{1}' }, { rename = 'b{1}' }] }", "into -1 group(s)"),
        ("split = { parts = [{ rename = 'a{1}', width = -1 }, { rename = 'b{1}', width = -1 }] }", "parts [-1, -1]"),
        ("regroup = { parts = [1, 1], from = 0, to = 2 }", "into 0 group(s)"),
        ("regroup = { parts = [1, 1], from = -1, to = 2 }", "into -1 group(s)"),
        ("regroup = { parts = [3, -1], from = 1, to = 2 }", "parts [3, -1]"),
        ("unpadded = { extent = -5 }", "-5 cannot be real"),
        ("unpadded = { extent = '0 - 5' }", "-5 cannot be real"),
        ("transpose = [2, 1, 0]", "does not fit"),
    ],
)
def test_counts_that_cannot_be(text: str, said: str) -> None:
    refused(f"[[rule]]\nmatch = 'l\\.(\\d)\\.w'\n{text}", "wrong.toml, rule 1", "l.0.w", said)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("{ dim = 0, part = 1, widths = [1, 1] }", "[0, (1, 1), 1]"),
        ("{ dim = 1, part = 1, widths = [3, 2] }", "[1, (3, 2), 1]"),
        ("{ dim = 0, part = 1, widths = [3, 2], groups = 2 }", "[0, (3, 2), 2]"),
    ],
)
def test_rules_that_join_one_tensor_in_different_ways(other: str, said: str) -> None:
    refused(JOIN + other, "rule 1", "rule 2", "model.j0", said)


def test_rules_that_join_one_tensor_may_say_the_same_in_other_words() -> None:
    text = "[let]\nthree = 3\n" + JOIN + "{ dim = 0, part = 1, widths = ['three', '1 + 1'] }"
    made = viewed(text)
    all_of = arrays()
    assert (shown(made, "model.j1") == np.concatenate([all_of["model.l.1.w"], all_of["model.l.1.o"].T])).all()


@pytest.mark.parametrize(
    "text",
    [
        "stack = '1'\nrename = 's'",
        "split = { parts = [{ rename = 'a{1}' }, { rename = 'b{1}' }] }",
        "unpadded = { extent = 1 }",
        "join = { part = 0, widths = [1] }\nrename = 's'\nstack = '1'",
    ],
)
def test_weights_without_dimensions_are_not_counters(text: str) -> None:
    refused(f"[[rule]]\nmatch = 'l\\.(\\d)\\.s'\n{text}", "rule 1", "model.l.0.s has shape []")


def test_layers_of_which_one_has_no_dimensions() -> None:
    text = "[[rule]]\nmatch = 'l\\.([01])\\.w'\nstack = 1\nrename = 'x'\n"
    refused(text + "[[rule]]\nmatch = 'l\\.(2)\\.s'\nstack = 1\nrename = 'x'", "model.l.2.s has shape []", "model.x")


def test_layers_of_other_types_are_named() -> None:
    made = {"model.0": index_array(2), "model.1": index_array(2).astype(np.int32)}
    text = "[[rule]]\nmatch = '(\\d)'\nstack = 1\nrename = 'x'"
    refused(text, "model.x", "of int32, int64", source=MemorySource(made, {}))


def test_counters_of_what_is_stacked_must_be_equal() -> None:
    made = arrays()
    text = "[[rule]]\nmatch = 'l\\.(\\d)\\.w'\nstack = 1\nrename = 'x'"
    assert shown(viewed(text, MemorySource(made, {})), "optim.x.step") == 7
    made["optim.l.2.w.step"] = np.array(8)
    refused(text, "optim.l.0.w.step and optim.l.2.w.step", "optim.x.step", source=MemorySource(made, {}))


def test_states_of_another_shape_than_their_weight() -> None:
    """Columns of a factored second moment are not rows of a padded vocabulary."""
    made = arrays() | {"optim.embed.exp_avg_sq_col": index_array(4)}
    text = "[[rule]]\nmatch = 'embed'\nunpadded = { extent = 3 }"
    refused(text, "rule 1", "optim.embed.exp_avg_sq_col", "[4]", "[10, 4]", source=MemorySource(made, {}))
    renamed = viewed("[[rule]]\nmatch = 'embed'\nrename = 'e'", MemorySource(made, {}))
    assert (shown(renamed, "optim.e.exp_avg_sq_col") == index_array(4)).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tied = 'embedd'", "did you mean 'model.embed'?"),
        ("tied = 'head'", "tied to each other"),
        ("tied = 'embed'\n[[rule]]\nmatch = 'embed'\ntied = 'head'", "tied to each other"),
        ("tied = 'embed'\n[[rule]]\nmatch = 'embed'\nrename = 'e'", "'model.embed', which is not there"),
        ("tied = 'embed'\n[[rule]]\nmatch = 'embed'\ndrop = true", "'model.embed', which is not there"),
        ("tied = 'norm'", "[10, 4] and cannot be tied to model.norm, which is int64 [4]"),
        ("tied = 'embed'\n[[rule]]\nmatch = 'norm'\nrename = 'head'", "both 'model.norm' and 'model.head' become"),
        ("tied = 'embed'\nrename = 'x'", "tied leaves nothing for rename to say"),
        ("drop = true\ntranspose = true", "drop leaves nothing for transpose to say"),
    ],
)
def test_ties_that_cannot_be(text: str, said: str) -> None:
    refused(f"[[rule]]\nmatch = 'head'\n{text}", said)


def test_a_tie_to_a_tie_leads_to_what_is_kept() -> None:
    made = arrays() | {"model.third": index_array(10, 4, start=300)}
    text = "[[rule]]\nmatch = 'third'\ntied = 'head'\n[[rule]]\nmatch = 'head'\ntied = 'embed'"
    made_view = viewed(text, MemorySource(made, {}))
    assert made_view.aliases() == {"model.third": "model.embed", "model.head": "model.embed"}
    assert (shown(made_view, "model.third") == made["model.embed"]).all()


def test_a_tie_does_not_lose_the_only_moments() -> None:
    made = arrays()
    del made["optim.embed.exp_avg"]
    text = "[[rule]]\nmatch = 'head'\ntied = 'embed'"
    refused(text, "optim.head.exp_avg", "'optim.embed.exp_avg', which is not there", source=MemorySource(made, {}))


@pytest.mark.parametrize(
    "text",
    [
        "[[rule]]\nmatch = 'embed'\nunpadded = { extent = 3 }",
        "[[rule]]\nmatch = 'head'\nregroup = { parts = [1, 1], from = 1, to = 5 }",
        "[[rule]]\nmatch = '(?:(embed)|head)'\ntranspose = true\nrename = '{1}x'\n",
    ],
)
def test_tensors_that_shared_bytes_and_are_shown_in_different_ways(text: str) -> None:
    """An alias is not written, so one that is no longer the same must not be called one."""
    source = Tied({"model.embed": index_array(10, 4)}, {"model.head": "model.embed"})
    made = viewed(text, source)
    for alias, owner in made.aliases().items():
        assert (shown(made, alias) == shown(made, owner)).all()
    assert len(made.aliases()) == ("transpose" in text)


def test_stacks_that_share_only_some_layers() -> None:
    layers = {f"model.{kind}.{n}": index_array(2, start=10 * n) for kind in "ab" for n in range(2)}
    source = Tied({name: layers[name] for name in ("model.a.0", "model.a.1", "model.b.1")}, {"model.b.0": "model.a.0"})
    made = viewed("[[rule]]\nmatch = '([ab])\\.(\\d)'\nstack = 2\nrename = '{1}'", source)
    assert made.aliases() == {}


def test_layers_far_from_each_other_cost_nothing() -> None:
    made = {f"model.l.{n}": index_array(2) for n in (0, 999_999_999)}
    refused("[[rule]]\nmatch = 'l\\.(\\d+)'\nstack = 1\nrename = 'l'", "layer 1, part 0", source=MemorySource(made, {}))


def test_an_empty_name() -> None:
    refused("[[rule]]\nmatch = 'norm'\nrename = ''", "rule 1", "model.norm would get an empty name")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = true", "version = True"),
        ("version = 1.0", "version = 1.0"),
        ("version = 1\nx = " + "[" * 3000, "nested too deeply"),
        ("version = 1\nx = " + "9" * 5000, "limit"),
        ("version = 1\n[[rule]]\nmatch = 'a'\ntranspose = ['a', 1]", "transpose is true or an order"),
        ("version = 1\n[[rule]]\nmatch = 'a'\ntranspose = [1.0, 0.0]", "transpose is true or an order"),
        ("version = 1\n[[rule]]\nmatch = 'a'\ntranspose = []", "transpose is true or an order"),
        ("version = 1\n[[rule]]\nmatch = 'a'\nexpert = -1", "expert counts from 0"),
        ("version = 1\n[[rule]]\nmatch = 'a'\nshard = 0\nwidths = []", "widths is one list per part"),
    ],
)
def test_files_that_do_not_follow_the_schema(text: str, said: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "wrong.toml")
    assert "wrong.toml" in str(caught.value)
    assert said in str(caught.value)


def test_names_of_files_and_presets(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"did you mean llama\?"):
        load_rules("lama:heads=4")
    with pytest.raises(NotFound, match="not the name of a rule file"):
        load_rules("a\0b")
    with pytest.raises(NotFound, match="Is a directory"):
        load_rules(tmp_path)
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbfversion = 1\r\n")  # as Windows writes UTF-8
    assert load_rules(marked).rules == ()


def test_names_of_let_are_found_once_and_circles_told() -> None:
    many = "\n".join(f"a{n} = '{'+'.join([f'a{n + 1}'] * 40)}'" for n in range(20))
    rules = parse_rules(f"{HEAD}[let]\n{many}\na20 = 1\nround = 'trip'\ntrip = 'round'", "let.toml")
    assert rules.value("a0", {}, "here") == 40**20
    with pytest.raises(RuleError, match="refers to itself in a circle"):
        rules.value("round", {}, "here")
    with pytest.raises(RuleError, match="give it, as n = <number> under"):
        parse_rules(f"{HEAD}[let]\nn = {{ from = ['args.n'] }}", "let.toml").value("n", {}, "here")
