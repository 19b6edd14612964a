"""`convert`: from one format to another, cold, until the result is durable; every engine's own converter.

The limit is the source's bytes copied by direct reads and writes.  A DeepSpeed source is written by DeepSpeed itself
on two ranks, where it is installed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..durability import count, evict, files_under, make_durable
from ..engine import Unavailable, require
from ..memory import Sampler
from ..names import LIMIT
from ..options import Job
from ..ranks import launch
from ..rivals.conversions import CONVERSIONS, Convert
from ..state import TensorState, gpt_like_tensors
from . import deepspeed_source
from .reshard import read_so_far


def measure(job: Job) -> dict[str, Any]:
    """Run the job (or a rank of the process group that writes the DeepSpeed source); seconds and bytes."""
    if job.phase == "deepspeed":
        return deepspeed_source.write(job)
    root = Path(job.directory)
    tasks = {name: converters[job.engine] for name, converters in CONVERSIONS.items() if job.engine in converters}
    if not tasks:
        raise Unavailable("it has no converter")
    sources: dict[str, Path] = {}
    results = {}
    state = gpt_like_tensors(job.size, job.state_bytes, "cpu")
    truth = None if job.engine == LIMIT else state
    for name, convert in tasks.items():
        kind = name.partition(" ")[0]
        try:
            if kind not in sources:
                sources[kind] = prepare(kind, root, state, job)
            results[name] = [one(convert, name, sources[kind], root / "target", truth) for _ in range(job.saves)]
        except Unavailable as reason:
            results[name] = [{"skipped": str(reason)}]
        except Exception as error:
            results[name] = [{"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}]
        finally:
            shutil.rmtree(root / "target", ignore_errors=True)
            (root / "target").unlink(missing_ok=True)
    return {"state_bytes": state.size_bytes, "conversions": results}


def prepare(kind: str, root: Path, state: TensorState, job: Job) -> Path:
    """The source of a kind: a path that converters take."""
    path = root / f"source-{kind}"
    if kind == "dcp":
        save(state.nested(), checkpoint_id=path)
    elif kind == "torch":
        path = path.with_suffix(".pt")
        torch.save(state.nested(), path)
    else:
        require("deepspeed")
        launch(job, "deepspeed", deepspeed_source.RANKS)
        path = root / "deepspeed" / deepspeed_source.TAG
    make_durable(path)
    return path


def one(convert: Convert, name: str, source: Path, target: Path, truth: TensorState | None) -> dict[str, Any]:
    """One conversion, and the check of what it made where the harness can read that."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    evict(source)
    read_before, written_before = read_so_far(), read_so_far("wchar:")
    with Sampler() as sampler:
        time.sleep(0.1)
        begun = time.monotonic()
        start = time.perf_counter()
        convert(source, target)
        make_durable(target)
        seconds = time.perf_counter() - start
    baseline = max(memory for moment, memory, _ in sampler.samples if moment < begun)
    size_bytes, files = count(target)
    source_bytes, _ = count(source)
    return {
        "seconds": seconds,
        "source_bytes": source_bytes,
        "bytes_on_disk": size_bytes,
        "files": files,
        "read_bytes": read_so_far() - read_before,
        "written_bytes": read_so_far("wchar:") - written_before,
        "extra_bytes": max(0, sampler.peak_bytes(begun) - baseline),
        "check": "not a checkpoint" if truth is None else check(name, target, truth),
    }


def check(name: str, target: Path, state: TensorState) -> str:
    """Compare what was written with the tensors that the source was made of, read by torch itself."""
    kind = name.rpartition(" ")[2]
    if kind == "torch":
        file = next(files_under(target))
        loaded = torch.load(file, weights_only=True)["tensors"]
    elif kind == "dcp" and name.startswith("torch"):
        nested = {"tensors": {key: torch.empty_like(tensor) for key, tensor in state.named.items()}}
        load(nested, checkpoint_id=target)
        loaded = nested["tensors"]
    else:
        return "not read back here"
    wrong = [key for key, tensor in state.named.items() if not torch.equal(loaded[key], tensor)]
    return f"WRONG BYTES in {len(wrong)} tensors, first {wrong[0]}" if wrong else "ok"
