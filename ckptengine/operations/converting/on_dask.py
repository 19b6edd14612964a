"""A conversion whose units run on the workers of a dask scheduler."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

from ckptengine.errors import CheckpointError, CoordinationFailed, UnusableRequest
from ckptengine.operations.converting.plan import Planned, make_plan
from ckptengine.operations.converting.run import finish, write_unit
from ckptengine.operations.converting.workspace import open_workspace
from ckptengine.operations.opening import open_any

_lock = threading.Lock()


def run_on_dask(
    planned: Planned,
    target: str,
    source: dict[str, Any],
    address: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, str]] | None:
    """Run all units on dask and finish here; the workers read the source and write the target by themselves."""
    job = planned.job
    spec = {
        **source,
        "target": os.path.abspath(target) if "://" not in target else target,
        "to": planned.plan.format,
        "layout": job.layout if planned.plan.layout else None,
        "memory_bytes": planned.memory_bytes,
        "workers": planned.plan.workers,
        "options": dict(job.options),
    }
    if "://" not in spec["source"]:
        spec["source"] = os.path.abspath(spec["source"])
    workspace = open_workspace(target)
    try:
        workspace.open(planned.fingerprint, "0-1")
        try:
            done = workspace.done()
            sizes = {unit.key: unit.read_bytes for unit in planned.units}
            total, finished = sum(sizes.values()), sum(sizes[key] for key in done if key in sizes)
            left = [unit.key for unit in planned.units if unit.key not in done]
            for key in _completed(address, spec, planned.fingerprint, left):
                finished += sizes[key]
                if progress is not None:
                    progress(finished, total)
            return finish(planned, workspace, os.path.basename(target))
        except Exception:
            workspace.discard()
            raise
    finally:
        workspace.close()


def _completed(address: str, spec: dict[str, Any], fingerprint: str, keys: list[str]) -> Any:
    """Keys of units as workers finish them."""
    frozen = tuple(sorted((key, _frozen(value)) for key, value in spec.items()))
    try:
        distributed: Any = importlib.import_module("distributed")  # an extra of its own, and slow to import
    except ImportError:
        raise UnusableRequest("conversion on dask needs the package distributed; pip install distributed") from None
    try:
        client = distributed.Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise CoordinationFailed(f"no dask scheduler answers at {address}: {error}; start one, or do without") from None
    with client:
        futures = [client.submit(run_remote_unit, frozen, fingerprint, key, pure=False) for key in keys]
        try:
            for future in distributed.as_completed(futures, loop=client.loop):
                try:
                    yield future.result()
                except CheckpointError:
                    raise
                except Exception as error:
                    raise CoordinationFailed(
                        f"a dask worker failed: {type(error).__name__}: {error}; see its log, then run again"
                    ) from error
        finally:
            client.cancel(futures)


def _frozen(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


@functools.lru_cache(maxsize=2)
def _planned(spec: tuple[tuple[str, Any], ...]) -> Planned:
    options = dict(spec)
    source = open_any(options["source"], options["step"], options["rules"])
    return make_plan(
        source,
        options["target"],
        to=options["to"],
        layout=options["layout"],
        rules=options["rules"],
        memory_bytes=options["memory_bytes"],
        workers=options["workers"],
        options=dict(options["options"]),
    )


def run_remote_unit(spec: tuple[tuple[str, Any], ...], fingerprint: str, key: str) -> str:
    """On a worker: write one unit into the workspace that the client holds; returns its key."""
    with _lock:
        planned = _planned(spec)
    if planned.fingerprint != fingerprint:
        raise UnusableRequest(
            "a dask worker sees another source than the client does; use paths that mean the same on every machine"
        )
    unit = next(unit for unit in planned.units if unit.key == key)
    workspace = open_workspace(dict(spec)["target"])
    write_unit(planned, workspace, unit, lambda _: None)
    workspace.settle([key])
    return key
