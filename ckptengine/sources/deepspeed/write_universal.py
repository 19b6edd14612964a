"""Write a universal checkpoint that DeepSpeed loads: ``--to deepspeed-universal``.

The target holds ``latest_universal`` and ``global_step<N>_universal/`` with one folder per parameter beneath ``zero/``.
Without a layout it is loaded by every stage of DeepSpeed 0.17 and later (of other optimizers than Adam by ZeRO-1 and
-2 only, since ZeRO-3 knows no other states); ``zero=3`` writes the flat tensors that older versions of ZeRO-3 expect,
``zero=1`` and ``zero=2`` what those stages do.

Options: ``frozen`` and ``precision`` as for ``--to deepspeed``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.deepspeed.classes import scaling, zero_stage
from ckptengine.sources.deepspeed.modelfile import ds_version, model_states
from ckptengine.sources.deepspeed.training import STEP, Trained, training_of, without_empty
from ckptengine.sources.deepspeed.write_flat import FlatOrder, config_as_written
from ckptengine.sources.deepspeed.write_plain import precision_of
from ckptengine.sources.emit import Tensor
from ckptengine.sources.stream import group_by_size
from ckptengine.sources.torchrecords import Run, TorchFile, memory_bytes, read_bytes
from ckptengine.sources.writer import Document, Job, Target, Unit

VERSION = 0.4
ADAM = ("exp_avg", "exp_avg_sq")
UNIT_BYTES = 64 << 20
"""Parameters are written together until their states have this size."""


class UniversalWriter:
    """The writer of ``--to deepspeed-universal``."""

    format = "deepspeed-universal"
    options = ("precision", "frozen")
    ranked = True

    def units(self, job: Job) -> Sequence[Unit]:
        """One unit per model file, and one for every few parameters."""
        plan = _Plan(job)
        return [self._unit(job, key, plan.files(key)) for key in plan.keys]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """The files of a unit."""
        for path, (file, value) in _Plan(job).files(unit.key).items():
            file.write(job, target, path, value)
        return {}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """The optimizer's common state, and ``latest_universal`` last."""
        plan = _Plan(job)
        file = TorchFile()
        file.write(job, target, f"{plan.folder}/zero/optimizer_state.pt", plan.optimizer(file))
        with target.create("latest_universal") as sink:
            sink.write(plan.folder.encode())

    def _unit(self, job: Job, key: str, files: Mapping[str, tuple[TorchFile, object]]) -> Unit:
        records = [record for file, _ in files.values() for record in file.records]
        names = tuple(dict.fromkeys(run.name for record in records for run in record.runs if run.name))
        nbytes = sum(file.nbytes(value) for file, value in files.values())
        return Unit(key, names, read_bytes(job, records), nbytes, memory_bytes(job), tuple(files))


class _Plan:
    """Which files there are, and what is in each."""

    def __init__(self, job: Job) -> None:
        beyond = [axis for axis in ("tp", "pp", "vpp", "ep", "etp", "cp") if getattr(job.layout, axis) not in (1, None)]
        if beyond:
            raise UnusableRequest(f"a universal checkpoint has no ranks; leave {beyond[0]} out of the layout")
        self._job = job
        self._stage = job.layout.zero
        training = without_empty(training_of(job))
        config = config_as_written(training.values.get("ds_config", {}), FlatOrder())
        self._training = dataclasses.replace(training, values={**training.values, "ds_config": config})
        if not self._training.groups:
            raise UnusableRequest("there is no parameter that an optimizer could train; write safetensors instead")
        self._check()
        self.folder = f"global_step{job.step or 0}_universal"
        self._models: dict[str, tuple[int, int]] = {}
        if self._stage != 3:
            self._models[f"{self.folder}/mp_rank_00_model_states.pt"] = (self._stage or 1, 0)
        if self._stage == 3 or (self._stage in (None, 0) and self._is_adam()):
            ranks = range(job.layout.dp)
            names = [f"{self.folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in ranks]
            self._models |= {name: (3, rank) for rank, name in enumerate(names)}
        self._members = {member.name: member for member in self._training.trained}
        bundles = group_by_size(list(self._members), self._bytes_of, UNIT_BYTES)
        self._bundles = {f"parameters-{number:05d}": names for number, names in enumerate(bundles)}
        self.keys = [*self._models, *self._bundles]

    def _check(self) -> None:
        """Refuse states that DeepSpeed does not take from a universal checkpoint, and would go on without."""
        for member in self._training.trained:
            single = next((tensor for key, tensor in member.scalars.items() if key != STEP), None)
            if single is not None:
                raise UnusableRequest(
                    f"{single} is a single number beside the step, and DeepSpeed takes none of those from a universal "
                    "checkpoint; write it with --to deepspeed"
                )
        if self._stage == 3 and not self._is_adam():
            raise UnusableRequest(
                f"ZeRO-3 takes {' and '.join(ADAM)} from a universal checkpoint, and this optimizer's states are "
                f"others; write it with --to deepspeed"
            )

    def _is_adam(self) -> bool:
        """Whether the states are those that ZeRO-3 loads; a job of that stage finds no checkpoint elsewhere."""
        trained = self._training.trained
        return all(set(member.states) <= set(ADAM) for member in trained)

    def files(self, key: str) -> dict[str, tuple[TorchFile, object]]:
        """The files of a unit: their storages and values by path."""
        if key in self._models:
            stage, rank = self._models[key]
            return {key: self._model(stage, rank)}
        found: dict[str, tuple[TorchFile, object]] = {}
        for name in self._bundles[key]:
            folder, member = f"{self.folder}/zero/{name}", self._members[name]
            for state, tensor in {"fp32": member.master, **member.states}.items():
                found[f"{folder}/{state}.pt"] = self._atom(tensor, member)
            if member.step is not None and self._stage != 3:
                file = TorchFile()
                found[f"{folder}/step.pt"] = (file, file.whole(self._job, member.step))
        return found

    def optimizer(self, file: TorchFile) -> dict[str, Any]:
        """``optimizer_state.pt``: what stages 1 and 2 read at the top, and what stage 3 reads further in."""
        training = self._training
        groups = [{**group.options, "params": [number]} for number, group in enumerate(training.groups)]
        half = precision_of(self._job, training) == "float16"
        state = {n: self._step(file, group.members) for n, group in enumerate(training.groups)}
        return {
            **scaling(training.optim, half=half, all_of_it=False),
            "zero_stage": zero_stage(self._stage or 1),
            "group_paddings": [0] * len(groups),
            "param_alignment_paddings": [[0] * len(group.members) for group in training.groups],
            "partition_count": [1] * len(groups),
            "ds_version": ds_version(training),
            "param_groups": groups,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
        }

    def _step(self, file: TorchFile, members: Sequence[Trained]) -> dict[str, Tensor]:
        step = members[0].step
        return {} if step is None else {"step": file.whole(self._job, step)}

    def _atom(self, tensor: str, member: Trained) -> tuple[TorchFile, object]:
        file = TorchFile()
        shape = (member.size,) if self._stage == 3 else member.shape
        atom = file.flat("float32", member.size, [Run(tensor, 0, member.size)], shape)
        return file, atom if self._stage == 3 else {"cat_dim": 0, "param": atom}

    def _model(self, stage: int, rank: int) -> tuple[TorchFile, object]:
        file = TorchFile()
        groups = [group.members for group in self._training.groups]
        value = model_states(self._job, self._training, file, groups, stage, rank, self._job.layout.dp)
        return file, {**value, "universal_checkpoint_info": {"universal_checkpoint_version": VERSION}}

    def _bytes_of(self, name: str) -> int:
        member = self._members[name]
        return member.size * itemsize("float32") * (1 + len(member.states))


WRITER = UniversalWriter
