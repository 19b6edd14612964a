"""Rule files: TOML in, `Rules` out.  Everything that is not understood is an error."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptengine.errors import NotFound, RuleError
from ckptengine.sources.rules.expression import Expression
from ckptengine.sources.rules.language import (
    INDEXES,
    Averaged,
    Group,
    Join,
    Layout,
    Part,
    Regroup,
    Replicated,
    Rule,
    Rules,
    Sharded,
    Split,
    Unpadded,
    Variable,
    View,
)

VERSION = 1
MAX_BYTES = 1 << 20
MAX_EXTENDS = 8
_PRESET = re.compile(r"([a-z0-9-]+)(?::(.*))?", re.ASCII)
_TOP = {"version", "name", "about", "extends", "optional", "groups", "let", "rule"}
_LAYOUT = {"replicated", "averaged", "shard", "parts", "widths", "expert", "pieces"}
_VIEW = {"unstack", "unpadded", "regroup", "split", "transpose", "rename", "join", "stack", "tied", "drop"}
_RULE = {"match", "optional", "about"} | _LAYOUT | _VIEW


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = importlib.resources.files("ckptengine.sources.rules") / "presets"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_rules(reference: str | os.PathLike[str]) -> Rules:
    """The rules of a TOML file, or of a preset: ``name`` or ``name:variable=number,...``.

    Raises `NotFound` when there is no such file or preset and `RuleError` for a file that does not follow the schema.
    """
    return _load(os.fspath(reference), 0)


def _load(reference: str, depth: int) -> Rules:
    if depth > MAX_EXTENDS:
        raise RuleError(f"{reference}: rule files extend each other more than {MAX_EXTENDS} times")
    match = _PRESET.fullmatch(reference)
    if match and match[1] in presets() and not os.path.exists(reference):
        folder = importlib.resources.files("ckptengine.sources.rules") / "presets"
        rules = parse_rules((folder / f"{match[1]}.toml").read_text("utf-8"), match[1], depth=depth)
        return _with_arguments(rules, match[2]) if match[2] else rules
    try:
        with open(reference, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(reference.partition(":")[0], presets(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise NotFound(f"no rule file and no preset {reference!r}; {hint}presets: {', '.join(presets())}") from None
    except ValueError:
        raise NotFound(f"{reference!r} is not the name of a rule file") from None
    except OSError as error:
        raise NotFound(f"cannot read the rule file {reference}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise RuleError(f"{reference}: a rule file has at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RuleError(f"{reference} is not UTF-8 text") from None
    return parse_rules(text, reference, os.path.dirname(reference), depth)


def parse_rules(text: str, name: str, folder: str = "", depth: int = 0) -> Rules:
    """The rules of a TOML text; ``name`` is used in messages, ``folder`` is where ``extends`` looks for files."""
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise RuleError(f"{name}: is nested too deeply") from None
    except ValueError as error:  # a TOMLDecodeError, or a number that is too long
        raise RuleError(f"{name}: {error}") from None
    _known(document, _TOP, name)
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise RuleError(f"{name}: version = {version!r}; this version of ckptengine reads version = {VERSION}")
    optional = _typed(document, "optional", bool, name, False)
    rules = [_rule(entry, f"{name}, rule {number}", optional) for number, entry in _entries(document, name)]
    variables = {key: _variable(key, value, name) for key, value in _typed(document, "let", dict, name, {}).items()}
    groups = tuple(_group(one, f"{name}, groups") for one in _typed(document, "groups", list, name, []))
    extends = document.get("extends")
    texts: tuple[str, ...] = (text,)
    if extends is not None:
        if not isinstance(extends, str):
            raise RuleError(f"{name}: extends is the name of a preset or of a rule file")
        beside = os.path.join(folder, extends)
        base = _load(beside if os.path.exists(beside) else extends, depth + 1)
        rules += [_lowered(rule) for rule in base.rules]
        variables = {**base.variables, **variables}
        texts += base.texts
        groups = groups or base.groups
    return Rules(name, tuple(rules), variables, texts, groups)


def _with_arguments(rules: Rules, text: str) -> Rules:
    variables = dict(rules.variables)
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in variables or not re.fullmatch(r"\d{1,18}", value):
            raise RuleError(f"{rules.name}: {item!r} is not <variable>=<number>; variables: {', '.join(variables)}")
        variables[key] = Variable(int(value))
    return replace(rules, variables=variables, texts=(*rules.texts, text))


def _lowered(rule: Rule) -> Rule:
    return replace(rule, priority=rule.priority + 1)


def _entries(document: Mapping[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    entries = document.get("rule", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RuleError(f"{name}: rules are written as [[rule]] tables")
    return list(enumerate(entries, 1))


def _rule(entry: dict[str, Any], where: str, optional: bool) -> Rule:
    _known(entry, _RULE, where)
    pattern = _typed(entry, "match", str, where)
    match = _pattern(pattern, f"{where}: match")
    where = f"{where} ({entry['about']})" if isinstance(entry.get("about"), str) else where
    layout, view = _layout(entry, where), _view(entry, where, match)
    expert = _dim(entry, "expert", where) if "expert" in entry else None
    if layout is None and view is None and expert is None:
        raise RuleError(f"{where}: says nothing about {pattern!r}; add shard, replicated, rename, ...")
    pieces = None
    if "pieces" in entry:
        pieces = tuple(_expression(n, f"{where}, pieces") for n in _typed(entry, "pieces", list, where))
        if not pieces or sum(n == -1 for n in pieces) > 1 or (layout is None and expert is None):
            raise RuleError(f"{where}: pieces is a shape, with one -1 at most, and needs shard, replicated or expert")
    return Rule(match, where, _typed(entry, "optional", bool, where, optional), 0, layout, expert, view, pieces)


def _group(entry: object, where: str) -> Group:
    if not isinstance(entry, list):
        return _pattern(entry, where)
    if not all(isinstance(name, str) for name in entry):
        raise RuleError(f"{where}: a group is a pattern, or a list of names")
    return tuple(entry)


def _pattern(pattern: object, where: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise RuleError(f"{where} = {pattern!r} is not a regular expression: it is no text")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise RuleError(f"{where} = {pattern!r} is not a regular expression: {error}") from None


def _layout(entry: dict[str, Any], where: str) -> Layout | None:
    said = [key for key in ("replicated", "averaged", "shard") if key in entry]
    if len(said) > 1:
        raise RuleError(f"{where}: {' and '.join(said)} exclude each other")
    if "shard" not in entry and ("parts" in entry or "widths" in entry):
        raise RuleError(f"{where}: parts and widths need shard, the dimension that is cut")
    if not said:
        return None
    if said[0] != "shard":
        if entry[said[0]] is not True:
            raise RuleError(f"{where}: {said[0]} can only be true")
        return Replicated() if said[0] == "replicated" else Averaged()
    parts = tuple(_expression(part, f"{where}, parts") for part in _typed(entry, "parts", list, where, [1]))
    widths = _typed(entry, "widths", list, where, None)
    if widths is not None:
        table = tuple(tuple(row) for row in widths if isinstance(row, list))
        if not table or len(table) != len(widths) or any(type(n) is not int or n < 0 for row in table for n in row):
            raise RuleError(f"{where}: widths is one list per part with the number of indices on each rank")
        if "parts" in entry and len(parts) != len(table):
            raise RuleError(f"{where}: {len(parts)} parts but {len(table)} rows of widths")
        return Sharded(_dim(entry, "shard", where), (1,) * len(table), table)
    if not parts:
        raise RuleError(f"{where}: parts is empty")
    return Sharded(_dim(entry, "shard", where), parts)


def _view(entry: dict[str, Any], where: str, match: re.Pattern[str]) -> View | None:
    if not _VIEW & entry.keys():
        return None
    for alone in ("tied", "drop"):
        if entry.get(alone) and len(_VIEW & entry.keys()) > 1:
            others = sorted(_VIEW & entry.keys() - {alone})
            raise RuleError(f"{where}: {alone} leaves nothing for {', '.join(others)} to say; leave that out")
    stack = _stack(entry, where, match)
    if "join" in entry and "rename" not in entry:
        raise RuleError(f"{where}: join needs rename, the name of the fused tensor")
    if "split" in entry and ("rename" in entry or "join" in entry):
        raise RuleError(f"{where}: the parts of split are renamed one by one; leave out rename and join")
    unstack = _unstack(entry, where)
    for name in INDEXES[: len(unstack)]:
        if f"{{{name}}}" not in str(entry.get("rename", entry.get("split"))):
            raise RuleError(f"{where}: unstack needs {{{name}}} in the new names")
    transpose = _typed(entry, "transpose", (bool, list), where, None)
    proper = not isinstance(transpose, list) or {*map(type, transpose)} == {int}
    if not proper or (isinstance(transpose, list) and sorted(transpose) != list(range(len(transpose)))):
        raise RuleError(f"{where}: transpose is true or an order of dimensions such as [1, 0]")
    return View(
        unstack=unstack,
        unpadded=_unpadded(entry["unpadded"], f"{where}, unpadded") if "unpadded" in entry else None,
        regroup=_regroup(entry["regroup"], f"{where}, regroup") if "regroup" in entry else None,
        split=_split(entry["split"], f"{where}, split") if "split" in entry else None,
        transpose=(1, 0) if transpose is True else tuple(transpose) if transpose else None,
        rename=_typed(entry, "rename", str, where, None),
        join=_join(entry["join"], f"{where}, join") if "join" in entry else None,
        stack=stack,
        tied=_typed(entry, "tied", str, where, None),
        drop=_typed(entry, "drop", bool, where, False),
    )


def _unstack(entry: dict[str, Any], where: str) -> tuple[int, ...]:
    """The dimensions whose indices become tensors of their own."""
    given = entry.get("unstack", [])
    listed = given if isinstance(given, list) else [given]
    if len(listed) > len(INDEXES) or len(set(map(str, listed))) < len(listed) or ("unstack" in entry and not listed):
        raise RuleError(f"{where}: unstack is a dimension or two different ones")
    return tuple(_dim({"unstack": dim}, "unstack", where) for dim in listed)


def _stack(entry: dict[str, Any], where: str, match: re.Pattern[str]) -> tuple[str, ...]:
    """The groups of the pattern that become leading dimensions."""
    given = _typed(entry, "stack", (str, int, list), where, [])
    listed = given if isinstance(given, list) else [given]
    if "stack" in entry and (not listed or len(listed) > len(INDEXES) or len({*map(str, listed)}) < len(listed)):
        raise RuleError(f"{where}: stack is a group of the pattern or two different ones")
    for group in listed:
        known = {*match.groupindex, *map(str, range(1, match.groups + 1))}
        if isinstance(group, bool) or not isinstance(group, str | int) or str(group) not in known:
            raise RuleError(f"{where}: stack = {group!r} is not a group of {match.pattern!r}")
    if listed and "rename" not in entry:
        raise RuleError(f"{where}: stack needs rename, the name of the stacked tensor")
    return tuple(map(str, listed))


def _regroup(entry: object, where: str) -> Regroup:
    table = _table(entry, {"dim", "parts", "from", "to"}, where)
    widths = tuple(_expression(width, f"{where}, parts") for width in _typed(table, "parts", list, where))
    if len(widths) < 2:
        raise RuleError(f"{where}: parts are the relative widths of two parts or more")
    before, after = (_expression(table.get(key, 1), f"{where}, {key}") for key in ("from", "to"))
    return Regroup(_dim(table, "dim", where, 0), widths, before, after)


def _unpadded(entry: object, where: str) -> Unpadded:
    table = _table(entry, {"dim", "extent"}, where)
    return Unpadded(_dim(table, "dim", where, 0), _expression(table.get("extent"), f"{where}, extent"))


def _split(entry: object, where: str) -> Split:
    table = _table(entry, {"dim", "parts", "groups"}, where)
    parts = []
    for part in _typed(table, "parts", list, where):
        row = _table(part, {"rename", "width"}, where)
        parts.append(Part(_typed(row, "rename", str, where), _expression(row.get("width", 1), f"{where}, width")))
    if not parts:
        raise RuleError(f"{where}: has no parts")
    return Split(_dim(table, "dim", where, 0), tuple(parts), _expression(table.get("groups", 1), f"{where}, groups"))


def _join(entry: object, where: str) -> Join:
    table = _table(entry, {"dim", "part", "widths", "groups"}, where)
    widths = tuple(_expression(width, f"{where}, widths") for width in _typed(table, "widths", list, where))
    part = _dim(table, "part", where)
    if part >= len(widths):
        raise RuleError(f"{where}: part {part} of {len(widths)} widths; parts count from 0")
    return Join(_dim(table, "dim", where, 0), part, widths, _expression(table.get("groups", 1), f"{where}, groups"))


def _variable(key: str, value: object, name: str) -> Variable:
    where = f"{name}, [let] {key}"
    if not key.isidentifier():
        raise RuleError(f"{where}: names are letters, digits and _")
    if not isinstance(value, dict):
        return Variable(_expression(value, where))
    table = _table(value, {"from", "default"}, where)
    paths = _typed(table, "from", list, where)
    if not all(isinstance(path, str) for path in paths):
        raise RuleError(f"{where}: from is a list of paths into the checkpoint's values, such as 'args.num_layers'")
    default = _expression(table["default"], where) if "default" in table else None
    return Variable(default, tuple(tuple(path.split(".")) for path in paths))


def _expression(value: object, where: str) -> Expression:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise RuleError(f"{where}: {value!r} is not a number or an expression")


def _table(entry: object, known: set[str], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RuleError(f"{where}: is a table of {', '.join(sorted(known))}")
    _known(entry, known, where)
    return entry


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise RuleError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _dim(table: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value: int = _typed(table, key, int, where, default)
    if value is None or not 0 <= value < 64:
        raise RuleError(f"{where}: {key} counts from 0")
    return value


_REQUIRED: Any = object()


def _typed(table: Mapping[str, Any], key: str, kind: Any, where: str, default: Any = _REQUIRED) -> Any:
    if key not in table:
        if default is _REQUIRED:
            raise RuleError(f"{where}: {key} is missing")
        return default
    value = table[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        raise RuleError(f"{where}: {key} = {value!r} is not a {' or '.join(k.__name__ for k in kinds)}")
    return value
