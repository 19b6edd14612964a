"""Folders of Accelerate's ``save_state`` and of transformers' ``Trainer``: weights, optimizers and other state.

Weights are ``model.<name>`` (of further models ``model_1.<name>`` and so on), optimizers ``optim``, ``optim_1`` and so
on.  Each other file's content goes under its name without suffix (``scheduler``, ``random_states_0``,
``trainer_state``): what the user registered as tensors and values, the tools' own as values, small tensors among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import UnreadableFormat
from ckptengine.sources.dcp.source import FORMAT as DCP
from ckptengine.sources.deepspeed.source import FORMAT as DEEPSPEED
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.joined import JoinedSource, Part
from ckptengine.sources.plain import DROPPED, plain
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.safetensors.source import SafetensorsSource, json_of, members
from ckptengine.sources.smalltensors import as_plain
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchfile.source import TorchSource
from ckptengine.sources.torchfile.source import members as torch_members
from ckptengine.sources.torchzip import is_torch_file, load_torch

_OPTIMIZER = re.compile(r"optimizer(?:_(\d+))?\.(?:bin|pt)")
_OPTIMIZER_FOLDER = re.compile(r"optimizer_(\d+)/")
_SAFETENSORS = re.compile(r"model(?:_(\d+))?\.safetensors(?:\.index\.json)?|adapter_model\.safetensors")
_TORCH = re.compile(
    r"pytorch_model(?:_fsdp)?(?:_(\d+))?\.bin(?:\.index\.json)?|adapter_model\.bin|model(?:_(\d+))?\.pt"
)
_FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_(\d+)/")
_LOCAL = re.compile(r"(?:pytorch_model_fsdp|optimizer)(?:_\d+)?_rank\d+\.bin")
_CUSTOM = re.compile(r"custom_checkpoint_\d+\.pkl")
_STATE = re.compile(
    r"(?:random_states_\d+|rng_state(?:_\d+)?|scheduler(?:_\d+)?|sampler(?:_\d+)?|dl_state_dict(?:_\d+)?|scaler"
    r"|training_args)\.(?:pkl|pt|pth|bin)"
)
_JSON = ("trainer_state.json", "config.json", "generation_config.json", "adapter_config.json")
_MARKS = re.compile(r"random_states_\d+\.pkl|trainer_state\.json")
_MARKER = "latest"
_MAX_MARKER_BYTES = 4096


@dataclass(slots=True)
class _Found:
    """What lies where: files of weights and folders by number of the model or optimizer, and other files."""

    safetensors: dict[int, str] = field(default_factory=dict)
    torch: dict[int, str] = field(default_factory=dict)
    sharded: dict[int, str] = field(default_factory=dict)
    optimizers: dict[int, str] = field(default_factory=dict)
    sharded_optimizers: dict[int, str] = field(default_factory=dict)
    custom: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    deepspeed: str | None = None

    @property
    def has_weights(self) -> bool:
        return bool(self.safetensors or self.torch or self.sharded or self.deepspeed)


def _look(files: Files) -> _Found:
    found = _Found()
    names = files.entries()
    for name in names:
        if match := _SAFETENSORS.fullmatch(name):
            _put(found.safetensors, match[1], name)
        elif match := _TORCH.fullmatch(name):
            _put(found.torch, match[1] or match[2], name)
        elif match := _FSDP_FOLDER.fullmatch(name):
            found.sharded[int(match[1])] = name[:-1]
        elif match := _OPTIMIZER.fullmatch(name):
            _put(found.optimizers, match[1], name)
        elif match := _OPTIMIZER_FOLDER.fullmatch(name):
            found.sharded_optimizers[int(match[1])] = name[:-1]
        elif _CUSTOM.fullmatch(name):
            found.custom.append(name)
        elif _STATE.fullmatch(name):
            found.state.append(name)
    if _MARKER in names:
        text = files.read(_MARKER, 0, min(files.size(_MARKER), _MAX_MARKER_BYTES)).decode("utf-8", "replace").strip()
        if f"{text}/" in names and DEEPSPEED.probe(Opening(files.sub(text))):
            found.deepspeed = text
    return found


def _put(held: dict[int, str], number: str | None, name: str) -> None:
    """An index goes before a file of the same model."""
    at = int(number or 0)
    if at not in held or name.endswith(".index.json"):
        held[at] = name


def _probe(opening: Opening) -> bool:
    """What Hugging Face's tools say by a file of their own, or weights of a known name beside an optimizer's file."""
    if opening.entry is not None:
        return False
    names = opening.files.entries()
    marked = any(_MARKS.fullmatch(name) for name in names)
    if not (marked or any(_OPTIMIZER.fullmatch(name) or _OPTIMIZER_FOLDER.fullmatch(name) for name in names)):
        return False
    return _look(opening.files).has_weights or any(_LOCAL.fullmatch(name) for name in names)


def _open(opening: Opening) -> Source:
    files = opening.files
    local = next((name for name in files.entries() if _LOCAL.fullmatch(name)), None)
    if local is not None:
        raise UnreadableFormat(
            f"{files.root.rstrip('/')}/{local} is of FSDP's LOCAL_STATE_DICT, which does not say what its flat parts "
            "are; save with SHARDED_STATE_DICT or FULL_STATE_DICT"
        )
    found = _look(files)
    inline = InlineFiles(files)
    states = _states(files, found)
    parts = list(_parts(opening, found, inline))
    values: dict[Any, Any] = {}
    for part in parts:
        values |= _values(part)
    values |= states
    for name in _JSON:
        if name in files.entries() and (read := json_of(files, name)) is not None:
            values[name.removesuffix(".json")] = read
    trainer = values.get("trainer_state")
    step = trainer.get("global_step") if isinstance(trainer, dict) else None
    known = [part.source.step for part in parts if part.source.step is not None]
    return JoinedSource(
        "huggingface", inline, parts, values, step if type(step) is int else next(iter(known), opening.step)
    )


def _states(files: Files, found: _Found) -> dict[str, object]:
    """What the tools' own files hold, as values; a file with a tensor too large for that is taken for the user's."""
    values: dict[str, object] = {}
    for name in found.state:
        if not is_torch_file(files, name):
            continue
        large: list[StoredTensor] = []

        def small(tensor: StoredTensor, large: list[StoredTensor] = large) -> object:
            made = as_plain(tensor, files)
            if made is DROPPED:
                large.append(tensor)
            return made

        held = plain(load_torch(files, name), small)
        if large:
            found.custom.append(name)
        else:
            values[_stem(name)] = held
    return values


def _parts(opening: Opening, found: _Found, inline: InlineFiles) -> Iterator[Part]:
    files = opening.files
    if found.deepspeed is not None:  # weights and optimizer are whole there; weights beside it are a copy of 16 bits
        inner = DEEPSPEED.open(Opening(files.sub(found.deepspeed), None, None, opening.rules))
        yield Part(inner, found.deepspeed)
        found.safetensors.pop(0, None)
        found.torch.pop(0, None)
    for at, name in found.safetensors.items():
        held = SafetensorsSource(inline, members(files, name))
        yield Part(held, "", {"model.": f"{_numbered('model', at)}."})
    for at, folder in found.sharded.items():
        yield Part(_dcp(files, folder), folder, {"model.": f"{_numbered('model', at)}."})
    for at, folder in found.sharded_optimizers.items():
        yield Part(_dcp(files, folder), folder, {"optimizer.": f"{_numbered('optim', at)}."})
    places: dict[str, str] = {}
    for at, name in found.torch.items():
        if at not in found.safetensors and at not in found.sharded:
            paths = torch_members(files, name) if name.endswith(".index.json") else [name]
            places |= dict.fromkeys(paths, _numbered("model", at))
    for at, name in found.optimizers.items():
        if at not in found.sharded_optimizers:
            places[name] = _numbered("optim", at)
    places |= {name: _stem(name) for name in found.custom if is_torch_file(files, name)}
    if places:
        yield Part(TorchSource(inline, list(places), None, places))


def _dcp(files: Files, folder: str) -> Source:
    return DCP.open(Opening(files.sub(folder)))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _numbered(name: str, at: int) -> str:
    return f"{name}_{at}" if at else name


def _values(part: Part) -> dict[Any, Any]:
    """A part's values, the keys of its prefixes renamed as in names of tensors."""
    values = part.source.values()
    if not isinstance(values, dict):
        return {}
    renamed: dict[Any, Any] = {}
    for key, value in values.items():
        new = part.renamed(f"{key}.")
        renamed[new[:-1] if isinstance(key, str) and new.endswith(".") else key] = value
    return renamed


FORMAT = Format("huggingface", _probe, _open)
