"""Open whatever checkpoint lies somewhere: find its step, its format and its files."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Sequence

from ckptengine.errors import CheckpointError, NotFound, UnreadableFormat
from ckptengine.sources.dcp.source import FORMAT as DCP
from ckptengine.sources.deepspeed.source import FORMAT as DEEPSPEED
from ckptengine.sources.files import LocalFiles, is_url, open_files
from ckptengine.sources.huggingface.source import FORMAT as HUGGINGFACE
from ckptengine.sources.megatron.source import FORMAT as MEGATRON
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.rules.present import present
from ckptengine.sources.safetensors.source import FORMAT as SAFETENSORS
from ckptengine.sources.torchfile.source import FORMAT as TORCH

FORMATS: tuple[Format, ...] = (DEEPSPEED, MEGATRON, HUGGINGFACE, DCP, SAFETENSORS, TORCH)
"""In the order in which they are tried: what also holds files of a plainer format comes first."""

LATEST = {"latest": "", "latest_checkpointed_iteration.txt": "iter_", "latest_universal": ""}
_STEP_FOLDER = re.compile(r"(?:iter_|checkpoint[-_]|step[-_]?|global_step)0*(\d{1,18})/")
_AT = re.compile(r"(.+)@(\d{1,18}|latest)", re.DOTALL)
_MAX_LATEST_BYTES = 4096
_MOST_FOLDERS = 16


def open_source(
    path: str | os.PathLike[str],
    step: int | None = None,
    rules: str | os.PathLike[str] | None = None,
    *,
    formats: Sequence[Format] = FORMATS,
    views: bool = True,
) -> Source:
    """The checkpoint at a local path or an fsspec URL; a trailing ``@<digits>`` or ``@latest`` picks a step.

    The path may be a file, a checkpoint's folder, or a folder of steps as the frameworks lay them out.  ``formats``
    are tried in their order.  ``rules`` say what pieces mean, and (unless ``views`` is False) how the whole is shown.
    Raises `NotFound` where there is nothing (or not that step), `UnreadableFormat` where
    nothing that is there is known, and what the format's own opener raises.
    """
    files, entry, wanted = _locate(os.fspath(path))
    source = _open_at(files, entry, wanted if step is None else step, rules, formats)
    return present(source, load_rules(rules)) if rules is not None and views else source


def split_step(path: str) -> tuple[str, int | None, bool]:
    """A path without its ``@<digits>`` or ``@latest``, the step (None: the newest), and whether there was one."""
    match = _AT.fullmatch(path)
    if match is None:
        return path, None, False
    return match[1], None if match[2] == "latest" else int(match[2]), True


def _locate(path: str) -> tuple[Files, str | None, int | None]:
    """The files, the entry among them where a file was named, and the step that the path asks for."""
    bare, step, marked = split_step(path)
    for text, number in ((path, None), (bare, step)) if marked else ((path, None),):
        found = _files_and_entry(text)
        if found is not None:
            return *found, number
    shown = bare if not is_url(bare) else open_files(bare).root
    raise NotFound(f"there is no checkpoint at {shown}: no such file or folder")


def _files_and_entry(text: str) -> tuple[Files, str | None] | None:
    if not is_url(text):
        if os.path.isdir(text):
            return LocalFiles(text), None
        if os.path.exists(text):
            folder, name = os.path.split(os.path.abspath(text))
            return _beside_file(folder, name), name
        return None
    files = open_files(text)
    if files.entries():
        parent, _, name = text.rstrip("/").rpartition("/")
        if files.entries() == [name] and not parent.endswith(":/"):  # some stores list a file as its own entry
            above = open_files(parent)
            if name in above.entries():
                return above, name
        return files, None
    parent, _, name = text.rstrip("/").rpartition("/")
    if parent.endswith((":", ":/")) or not name:
        return None
    above = open_files(parent)
    return (above, name) if name in above.entries() else None


def _beside_file(folder: str, name: str) -> Files:
    """The folder of a file that the user named; where that is a link, of what it points to under the same name."""
    real = os.path.realpath(os.path.join(folder, name))
    return LocalFiles(folder, (os.path.dirname(real),) if os.path.islink(os.path.join(folder, name)) else ())


def _open_at(
    files: Files,
    entry: str | None,
    step: int | None,
    rules: str | os.PathLike[str] | None,
    formats: Sequence[Format],
    depth: int = 0,
) -> Source:
    for format_ in formats:
        told = step if depth or format_.picks_step else None
        opening = Opening(files, entry, told, rules)
        if format_.probe(opening):
            source = format_.open(opening)
            if not depth and step not in (None, source.step):
                raise NotFound(_other_step(files, entry, source.step, step))
            return source
    if entry is not None:
        raise UnreadableFormat(
            f"{files.root.rstrip('/')}/{entry} is no checkpoint of a known format ({_known(formats)})"
        )
    folder, number = _step_folder(files, step) if depth < 2 else (None, None)
    if folder is not None:
        return _open_at(files.sub(folder), None, number, rules, formats, depth + 1)
    names = files.entries()
    what = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    inside = _checkpoints_inside(files, formats)
    hint = f"; open one of its folders: {inside}" if inside else ""
    if any(name.endswith(".distcp") for name in names):
        hint = "; it lacks the .metadata of torch.distributed.checkpoint: that save was not finished"
    raise UnreadableFormat(
        f"{files.root} holds no checkpoint of a known format ({_known(formats)}); it has {what}{hint}"
    )


def _checkpoints_inside(files: Files, formats: Sequence[Format]) -> str:
    """The first folders that are checkpoints: NeMo's ``weights``, OLMo's ``model_and_optim``, parts of a pipeline."""
    found = []
    for name in [name for name in files.entries() if name.endswith("/")][:_MOST_FOLDERS]:
        with contextlib.suppress(CheckpointError):
            opening = Opening(files.sub(name.rstrip("/")), None, None, None)
            known = next((format_.name for format_ in formats if format_.probe(opening)), None)
            if known is not None:
                found.append(f"{name} ({known})")
    return ", ".join(found)


def _other_step(files: Files, entry: str | None, found: int | None, wanted: int | None) -> str:
    shown = posixpath.join(files.root, entry) if entry else files.root
    what = "does not say which step it is" if found is None else f"is of step {found}"
    return f"{shown} is one checkpoint, which {what}, and not step {wanted}; leave the step out"


def _known(formats: Sequence[Format]) -> str:
    return ", ".join(format_.name for format_ in formats)


def _step_folder(files: Files, step: int | None) -> tuple[str | None, int | None]:
    """The folder of the wanted step beneath a root of steps, and its number; (None, None) where this is no such root.

    Without a step, what a ``latest`` file names comes first, then the highest number.
    """
    names = files.entries()
    numbered = {int(match[1]): name for name in names if (match := _STEP_FOLDER.fullmatch(name))}
    if step is not None:
        if not numbered:
            return None, None
        if step not in numbered:
            steps = ", ".join(map(str, sorted(numbered)[-5:]))
            raise NotFound(f"{files.root} has no step {step}; the last ones are {steps}")
        return numbered[step].rstrip("/"), step
    for marker, prefix in LATEST.items():
        if marker in names:
            text = files.read(marker, 0, min(files.size(marker), _MAX_LATEST_BYTES)).decode("utf-8", "replace").strip()
            folder = f"iter_{int(text):07d}" if prefix and text.isdigit() else text
            if not folder or not files.exists(folder):
                raise NotFound(f"{posixpath.join(files.root, marker)} names {folder!r}, which does not exist")
            match = _STEP_FOLDER.match(folder + "/")
            return folder, int(match[1]) if match else None
    if numbered:
        newest = max(numbered)
        return numbered[newest].rstrip("/"), newest
    return None, None
