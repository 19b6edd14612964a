"""`convert`: from one format to another, cold, until the result is durable; every engine's own converter.

The limit is the source's bytes copied by direct reads and writes, right before each conversion.  A DeepSpeed source is
written by DeepSpeed itself on two ranks, where it is installed, together with the truth about it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from ..durability import count, evict, make_durable
from ..engine import Unavailable, require
from ..memory import Sampler
from ..names import LIMIT
from ..options import Job
from ..ranks import launch
from ..rivals.conversions import CONVERSIONS, Convert, copy_directly
from ..state import TensorState, gpt_like_tensors
from . import deepspeed_source
from .convert_check import check
from .reshard import read_so_far

Truth = Mapping[str, torch.Tensor]
"""``<name>:<weight, exp_avg or exp_avg_sq>`` to its elements."""

ENOUGH_S = 8.0
"""A conversion is not repeated in the same process once its runs took this long together."""


def measure(job: Job) -> dict[str, Any]:
    """Run the job (or a rank of the process group that writes the DeepSpeed source); seconds and bytes."""
    if job.phase == "deepspeed":
        return deepspeed_source.write(job)
    root = Path(job.directory)
    tasks = {name: converters[job.engine] for name, converters in CONVERSIONS.items() if job.engine in converters}
    if not tasks:
        raise Unavailable("it has no converter")
    sources: dict[str, tuple[Path, Truth] | Unavailable] = {}
    results = {}
    state = gpt_like_tensors(job.size, job.state_bytes, "cpu")
    for name, convert in tasks.items():
        kind = name.partition(" ")[0]
        try:
            if kind not in sources:
                sources[kind] = prepare(kind, root, state, job)
            prepared = sources[kind]
            if isinstance(prepared, Unavailable):
                raise prepared
            results[name] = repeated(convert, name, *prepared, root / "target", job)
        except Unavailable as reason:
            sources.setdefault(kind, reason)
            results[name] = [{"skipped": str(reason)}]
        except Exception as error:
            results[name] = [{"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}]
        finally:
            remove(root / "target")
    return {"state_bytes": state.size_bytes, "conversions": results}


def prepare(kind: str, root: Path, state: TensorState, job: Job) -> tuple[Path, Truth]:
    """The source of a kind, as a path that converters take, and what is in it."""
    path = root / f"source-{kind}"
    truth: Truth = state.named
    if kind == "dcp":
        save(state.nested(), checkpoint_id=path)
    elif kind == "torch":
        path = path.with_suffix(".pt")
        torch.save(state.nested(), path)
    else:
        require("deepspeed")
        launch(job, "deepspeed", deepspeed_source.RANKS)
        path = root / "deepspeed" / deepspeed_source.TAG
        truth = deepspeed_source.truth(root)
    make_durable(path)
    return path, truth


def repeated(convert: Convert, name: str, source: Path, truth: Truth, target: Path, job: Job) -> list[dict[str, Any]]:
    """Conversions one after the other, as many as asked for while they are quick; what each made is checked."""
    runs: list[dict[str, Any]] = []
    spent_s = 0.0
    while len(runs) < job.saves and spent_s < ENOUGH_S:
        run = one(convert, source, target)
        run["check"] = "not a checkpoint" if job.engine == LIMIT else check(name, source, target, truth)
        spent_s += run["seconds"]
        runs.append(run)
    return runs


def one(convert: Convert, source: Path, target: Path) -> dict[str, Any]:
    """One conversion, right after a plain copy of the same bytes; the target is left there."""
    remove(target)
    evict(source)
    start = time.perf_counter()
    copy_directly(source, target)
    make_durable(target)
    copy_s = time.perf_counter() - start
    remove(target)
    evict(source)
    with Sampler() as sampler:
        time.sleep(0.1)
        read_before, written_before = read_so_far(), read_so_far("wchar:")
        begun = time.monotonic()
        start = time.perf_counter()
        convert(source, target)
        make_durable(target)
        seconds = time.perf_counter() - start
        read_bytes, written_bytes = read_so_far() - read_before, read_so_far("wchar:") - written_before
    baseline = max(memory for moment, memory, _ in sampler.samples if moment < begun)
    size_bytes, files = count(target)
    source_bytes, _ = count(source)
    return {
        "seconds": seconds,
        "copy_s": copy_s,
        "source_bytes": source_bytes,
        "bytes_on_disk": size_bytes,
        "files": files,
        "read_bytes": read_bytes,
        "written_bytes": written_bytes,
        "extra_bytes": max(0, sampler.peak_bytes(begun) - baseline),
    }


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
