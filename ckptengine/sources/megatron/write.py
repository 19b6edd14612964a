"""Write a checkpoint that Megatron-core loads onto any parallelism: ``--to megatron``.

The target holds ``latest_checkpointed_iteration.txt`` and ``iter_<N>/`` in the ``torch_dist`` format, which is torch
DCP with Megatron's keys.  Names must be Megatron's, layers stacked where Megatron stacks them; a rule file or a preset
such as ``llama-to-megatron`` gives them that form.  The layout says into how many files tensors are cut, and by its
``ep`` whether experts are trained by an optimizer of their own (as in the source where it is not given).

Options: ``overlap_param_gather_with_optimizer_step``: whether the first virtual stage has an optimizer of its own (as
in the source).  ``master`` (``"fp32_param"``, the default, or ``"param"`` for the distributed optimizer's
``fully_reshardable`` form): the key of fp32 copies.  ``legacy`` (default False): one folder per tensor-, pipeline- and
expert-parallel rank of the layout with the weights only, cut as the rules or else ``megatron-gpt`` say;
``vocab_divisible_by=N`` pads the vocabulary to a multiple of N rows for each tensor-parallel rank, as Megatron does
with N = 128.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.dcp.write import DcpWriter
from ckptengine.sources.emit import Global, Instance
from ckptengine.sources.megatron.chain import Experts, Links
from ckptengine.sources.megatron.extra import extra_states
from ckptengine.sources.megatron.legacy_write import LegacyWriter
from ckptengine.sources.megatron.naming import MASTERS
from ckptengine.sources.megatron.torch_dist import COMMON, MANIFEST
from ckptengine.sources.rules.names import Names
from ckptengine.sources.stored import NUMPY_DTYPES
from ckptengine.sources.torchrecords import TorchFile
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Sink, Target, Unit, Wanted

HALVES = ("bfloat16", "float16")
FIRST_ALONE = "overlap_param_gather_with_optimizer_step"
TRACKER = "latest_checkpointed_iteration.txt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class MegatronWriter:
    """The writer of ``--to megatron``."""

    format = "megatron"
    options = ("legacy", "master", "vocab_divisible_by", FIRST_ALONE, *DcpWriter.options)
    ranked = True

    def units(self, job: Job) -> Sequence[Unit]:
        """Those of the DCP checkpoint that this is, or one per rank."""
        if job.flag("legacy"):
            return LegacyWriter(job).units()
        view = _View(job)
        view.check()
        return [
            dataclasses.replace(
                unit,
                tensors=tuple(dict.fromkeys(view.names[key] for key in unit.tensors)),
                files=tuple(f"{view.folder}/{file}" for file in unit.files),
            )
            for unit in DcpWriter().units(view.job)
        ]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """One file of tensors."""
        if job.flag("legacy"):
            return LegacyWriter(job).write(unit, target)
        view = _View(job)
        inner = next(made for made in DcpWriter().units(view.job) if made.key == unit.key)
        return DcpWriter().write(view.job, inner, _Beneath(target, view.folder))

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """The metadata, ``common.pt``, the manifest; and the file that makes the iteration the newest, last."""
        iteration = job.step or 0
        if not job.flag("legacy"):
            view = _View(job)
            beneath = _Beneath(target, view.folder)
            DcpWriter(nested=False).finish(view.job, results, beneath)
            file = TorchFile()
            file.write(job, beneath, COMMON, view.common(file))
            with beneath.create(MANIFEST) as sink:
                sink.write(json.dumps(_BACKEND).encode())
        with target.create(TRACKER) as sink:
            sink.write(str(iteration).encode())


class _View:
    """The job as the DCP writer sees it: tensors under Megatron's keys, objects as its only values."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.folder = f"iter_{job.step or 0:07d}"
        master = job.options.get("master", MASTERS[0])
        if master not in MASTERS:
            raise UnusableRequest(f"option master = {master!r}; it is one of {', '.join(MASTERS)}")
        self._is_distributed = master == MASTERS[1]
        self._is_half = any(name[:6] == "model." and job.tensor(name).dtype in HALVES for name in job.names)
        names = [name for name in job.names if name not in job.aliases]
        known = Names(names)
        self.names: dict[str, str] = {}
        self._steps: list[str] = []
        self._trained: list[str] = []
        """Parameters that have a state."""
        for name in names:
            canonical = known.take_apart(name)
            if not canonical.root:
                raise UnusableRequest(f"{name!r} is neither a weight nor a state of one; drop or rename it with rules")
            state = canonical.state
            if state:
                self._trained.append(canonical.parameter)
            if state == "step":
                self._steps.append(name)
            elif state:
                kept = master if state == "master" else state
                self.names[f"optimizer.state.{kept}.{canonical.parameter}"] = name
            else:
                self.names[canonical.parameter] = name
        plain = plain_values(job)
        self._values: dict[str, Any] = dict(plain) if isinstance(plain, dict) else {}
        objects = self._values.pop("objects", None)
        shapes = {key: job.tensor(name).shape for key, name in self.names.items()}
        self.job = dataclasses.replace(
            job,
            names=list(self.names),
            tensor=self._tensor,
            read=self._read,
            read_many=self._read_many,
            values=dict(objects) if isinstance(objects, dict) else extra_states(shapes),
            encoded_values=None,
            aliases={},
        )

    def _tensor(self, key: str) -> LogicalTensor:
        return dataclasses.replace(self._job.tensor(self.names[key]), name=key)

    def _read(self, key: str, box: Box, out: Any) -> None:
        self._job.read(self.names[key], box, out)

    def _read_many(self, wanted: Sequence[Wanted]) -> None:
        self._job.read_many([(self.names[key], box, view) for key, box, view in wanted])

    def common(self, file: TorchFile) -> dict[str, Any]:
        """The value of ``common.pt``: what all ranks share, the optimizer's groups and its step among it."""
        values = {key: value for key, value in self._values.items() if key != "optim"}
        if (links := self._links()) is not None:
            made = [self._for_optimizer(*link, file) for link in zip(links.outer, links.inner, strict=True)]
            values["optimizer"] = made[0] if len(made) == 1 else dict(enumerate(made))
        if isinstance(values.get("args"), dict):
            values["args"] = Instance(Global("argparse", "Namespace"), values["args"])
        metadata = values.get("content_metadata")
        values["content_metadata"] = {**(metadata if isinstance(metadata, dict) else {}), **self._content()}
        return dict(file.with_small_tensors({**values, "iteration": self._job.step or 0}))

    def _content(self) -> dict[str, Any]:
        """What Megatron must know of the form of its own states to ask for them."""
        content: dict[str, Any] = {
            "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in self.names),
            "chained_optim_avoid_prefix": True,
        }
        if self._is_distributed:
            content["distrib_optim_sharding_type"] = "fully_reshardable"
        return content

    def _links(self) -> Links | None:
        """The optimizer's values for as many optimizers as the job that is to load them has."""
        optimizer, optim = self._values.get("optimizer"), self._values.get("optim")
        links = Links.of(optimizer if isinstance(optimizer, dict) else {})
        if not links.others and not links.experts and isinstance(optim, dict):
            outer = optimizer if isinstance(optimizer, dict) else {}
            links = Links.of({**outer, "optimizer": {"param_groups": optim.get("param_groups")}})
        if not links.others and not links.experts:
            return None
        asked = self._job.layout.ep
        experts = Experts.among(self._trained)
        is_parallel = bool(links.experts) if asked is None else asked > 1
        first_alone = self._job.options.get(FIRST_ALONE, links.stages > 1)
        return links.arranged(2 if first_alone else 1, experts if is_parallel and experts else None)

    def _for_optimizer(self, outer: dict[Any, Any], inner: dict[Any, Any], file: TorchFile) -> dict[Any, Any]:
        """The values of one optimizer.

        The step is kept once, or in every group; an optimizer of fp32 weights that is not distributed wraps nothing.
        """
        made = {key: value for key, value in inner.items() if key not in ("param_state_sharding_type", "state")}
        if self._steps and self._is_distributed:
            (step,) = self._read_steps(self._steps[:1]).values()
            made["param_groups"] = [{**group, "step": step} for group in made["param_groups"]]
        elif self._steps:
            made["state"] = {"common_step": file.whole(self._job, self._steps[0])}
        outer = {key: value for key, value in outer.items() if key not in ("param_state_sharding_type", "state")}
        if self._is_distributed:
            return {**outer, "optimizer": made, "param_state_sharding_type": "fully_reshardable"}
        return {**outer, "optimizer": made} if self._is_half else made

    def check(self) -> None:
        """`UnusableRequest` where Megatron's optimizers cannot have these values; one counts for all parameters."""
        self._links()
        steps = self._read_steps(self._steps)
        other = next((name for name in self._steps if steps[name] != steps[self._steps[0]]), None)
        if other is not None:
            raise UnusableRequest(
                f"{self._steps[0]} is {steps[self._steps[0]]} and {other} is {steps[other]}, but Megatron has one step "
                "for all parameters; drop those that differ with rules, or write another format"
            )

    def _read_steps(self, names: Sequence[str]) -> dict[str, float | int]:
        tensors = [self._job.tensor(name) for name in names]
        for tensor in tensors:
            if tensor.dtype not in NUMPY_DTYPES or tensor.shape:
                raise UnusableRequest(f"{tensor.name} is {tensor.dtype}{list(tensor.shape)}, which is no counter")
        data = [bytearray(tensor.nbytes) for tensor in tensors]
        self._job.read_many([(t.name, Box((), ()), memoryview(d)) for t, d in zip(tensors, data, strict=True)])
        return {t.name: np.frombuffer(d, NUMPY_DTYPES[t.dtype])[0].item() for t, d in zip(tensors, data, strict=True)}


class _Beneath:
    """A folder of a target as a target."""

    def __init__(self, target: Target, folder: str) -> None:
        self._target = target
        self._folder = folder

    @property
    def root(self) -> str:
        return f"{self._target.root.rstrip('/')}/{self._folder}"

    def create(self, path: str) -> AbstractContextManager[Sink]:
        return self._target.create(f"{self._folder}/{path}")

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        self._target.put(f"{self._folder}/{path}", data)

    def local_path(self, path: str) -> str | None:
        return self._target.local_path(f"{self._folder}/{path}")


WRITER = MegatronWriter
