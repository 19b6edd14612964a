"""Write a checkpoint that DeepSpeed resumes from: ``--to deepspeed --layout dp=4,zero=1``.

The target holds ``latest`` and ``global_step<N>/``.  ``zero`` is the stage (1 if not given; 0 is training without
ZeRO, for any number of ranks), ``dp`` the number of ranks.  Parameters lie in the order of the optimizer's groups, so
the job that resumes must build the same groups.  A parameter without a master copy gets its weight as one, exactly.
Where the source has no settings of the groups, stages 1 and 2 are written as elastic: the job keeps its own.

With ``ep`` the experts of DeepSpeed's own MoE layers lie on that many expert-parallel ranks (ZeRO-1 and -2).

Options: ``sub_group_size`` (ZeRO-3; default 1,000,000,000, DeepSpeed's own), ``round_robin_gradients`` and
``parameter_alignment`` (ZeRO-1 and -2; true or false, else what the source's DeepSpeed config says), ``frozen`` (a
regular expression of the parameters that are not trained; everything else that is not trained is a buffer),
``precision`` (``fp32``, ``bf16`` or ``fp16``: what the job trains in, where neither 16-bit weights nor the source's
DeepSpeed config say it), ``fused`` (stage 0 in 16 bits: true where the job's Adam is DeepSpeed's or Apex's fused one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.sources.deepspeed.classes import scaling, zero_stage
from ckptengine.sources.deepspeed.modelfile import ds_version, model_states
from ckptengine.sources.deepspeed.training import STEP, Group, Trained, check_counters, training_of, without_empty
from ckptengine.sources.deepspeed.write_experts import Share, experts_of, without_experts
from ckptengine.sources.deepspeed.write_flat import (
    ALIGNED,
    ROUND_ROBIN,
    arranged,
    config_as_written,
    flat_order,
    sliced,
)
from ckptengine.sources.deepspeed.write_plain import is_fused, precision_of
from ckptengine.sources.emit import Tensor
from ckptengine.sources.torchrecords import Run, TorchFile, memory_bytes, read_bytes
from ckptengine.sources.writer import Document, Job, Target, Unit

SUB_GROUP_SIZE = 1_000_000_000


class DeepSpeedWriter:
    """The writer of ``--to deepspeed``."""

    format = "deepspeed"
    options = ("precision", "fused", "frozen", "sub_group_size", ROUND_ROBIN, ALIGNED)
    ranked = True

    def units(self, job: Job) -> Sequence[Unit]:
        """One unit per file; ZeRO-3's small model files are written at the end."""
        plan = _Plan(job)
        plan.check()
        return [self._unit(job, plan, path) for path in plan.paths]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """One file of one rank."""
        file, value = _Plan(job).file(unit.key)
        file.write(job, target, unit.key, value)
        return {}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """``latest``, which makes the folder the one that DeepSpeed loads."""
        with target.create("latest") as sink:
            sink.write(_Plan(job).folder.encode())

    def _unit(self, job: Job, plan: _Plan, path: str) -> Unit:
        file, value = plan.file(path)
        runs = [run for record in file.records for run in record.runs if run.name]
        names = tuple(dict.fromkeys(run.name for run in runs))
        return Unit(path, names, read_bytes(job, file.records), file.nbytes(value), memory_bytes(job), (path,))


class _Plan:
    """Which files there are, and what is in each."""

    def __init__(self, job: Job) -> None:
        layout = job.layout
        beyond = [axis for axis in ("tp", "pp", "vpp", "etp", "cp") if getattr(layout, axis) not in (1, None)]
        if beyond:
            raise UnusableRequest(
                f"ZeRO checkpoints are written for data- and expert-parallel ranks only, not with {beyond[0]} > 1; "
                "write deepspeed-universal, which DeepSpeed loads with any of them"
            )
        self._job = job
        self._dp = layout.dp
        self._stage = 1 if layout.zero is None else layout.zero
        self._training = training_of(job)
        self.folder = f"global_step{job.step or 0}"
        precision = precision_of(job, self._training)
        if self._stage or precision != "float32":
            self._training = without_empty(self._training)
        self._order = flat_order(job, self._training, self._stage, precision)
        config = config_as_written(self._training.values.get("ds_config", {}), self._order)
        self._training = dataclasses.replace(self._training, values={**self._training.values, "ds_config": config})
        self._half = precision == "float16"
        if not self._training.groups:
            raise UnusableRequest("there is no parameter that an optimizer could train; write safetensors instead")
        self._experts = experts_of(self._training, layout.ep or 1, layout.dp, self._stage)
        prefix = "bf16_" if precision == "bfloat16" else ""
        made = range(self._dp) if self._stage else ()
        optim = [f"{self.folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in made]
        if self._stage == 3:
            models = [f"{self.folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(self._dp)]
        else:
            models = [f"{self.folder}/mp_rank_00_model_states.pt"]
        self._ranks = {path: rank for paths in (models, optim) for rank, path in enumerate(paths)}
        self._models = set(models)
        files = self._experts.files(self._training) if self._experts is not None else {}
        self._expert_files = {f"{self.folder}/{name}": weights for name, weights in files.items()}
        self.paths = [*models, *self._expert_files, *optim]

    def check(self) -> None:
        """Refuse what DeepSpeed could not go on from."""
        training = self._training
        if self._stage or is_fused(self._job, training, self._stage):
            check_counters(self._job, training)
        if self._stage not in (1, 2) and not training.has_settings and any(m.states for m in training.trained):
            raise UnusableRequest(
                "the source holds optimizer states but no learning rates and other settings of its groups (it is "
                f"elastic), which stage {self._stage} takes from the checkpoint; write zero=1, or universal"
            )

    def file(self, path: str) -> tuple[TorchFile, object]:
        """A file's storages and its value."""
        file = TorchFile()
        if path in self._expert_files:
            return file, {name: file.whole(self._job, held) for name, held in self._expert_files[path].items()}
        rank = self._ranks[path]
        if path in self._models:
            return file, self._model(file, rank)
        state = self._stage3(file, rank) if self._stage == 3 else self._stage12(file, rank)
        rest = {"ds_config": self._training.values.get("ds_config", {}), "ds_version": ds_version(self._training)}
        return file, {"optimizer_state_dict": state, **rest}

    def _model(self, file: TorchFile, rank: int) -> dict[str, Any]:
        groups, training = self._member_groups(), self._training
        if self._experts is None:
            return model_states(self._job, training, file, groups, self._stage, rank, self._dp)
        dense = without_experts(training)
        value = model_states(self._job, dense, file, groups, self._stage, rank, self._dp)
        return {**value, "num_experts": list(self._experts.layers.values())}

    def _shares(self, rank: int) -> list[Share]:
        """The groups as a rank of ZeRO-1 or -2 sees them."""
        groups = self._training.groups
        if self._experts is not None:
            return self._experts.shares(groups, rank)
        return [Share(group, rank, self._dp) for group in groups]

    # the optimizer files

    def _stage12(self, file: TorchFile, rank: int) -> dict[str, Any]:
        masters: list[Tensor] = []
        states: dict[int, dict[str, Any]] = {}
        paddings: list[int] = []
        mappings: list[dict[str, Any]] = []
        gaps: list[list[int]] = []
        shares = self._shares(rank)
        for number, share in enumerate(shares):
            flat = arranged(share.group.members, share.count, self._order)
            unit = -(-flat.size // (2 * share.count)) * 2
            start = min(share.position * unit, flat.size)
            stop = min(start + unit, flat.size)
            masters.append(file.flat("float32", stop - start, flat.runs(start, stop, "")))
            runs = {key: flat.runs(start, stop, key) for key in share.group.keys}
            held = unit if self._training.has_settings else stop - start
            states[number] = self._states(file, flat.members, held, runs)
            paddings.append(unit - (stop - start))
            mappings.append(flat.mapping(start, stop))
            gaps.append(list(flat.gaps))
        return {
            **scaling(self._training.optim, half=self._half, all_of_it=False),
            **self._base(states),
            "single_partition_of_fp32_groups": masters,
            "zero_stage": zero_stage(self._stage),
            "group_paddings": paddings,
            "param_alignment_paddings": gaps,
            "partition_count": [share.count for share in shares],
            "ds_version": ds_version(self._training),
            "param_slice_mappings": mappings,
        }

    def _base(self, states: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """The base optimizer: as torch keeps it, or the states alone (elastic) so that the job's own settings stay."""
        if self._training.has_settings:
            return {
                "base_optimizer_state": {"state": states, "param_groups": self._param_groups([[n] for n in states])}
            }
        steps = [group.options[STEP] for group in self._training.groups if STEP in group.options]
        return {"base_optimizer_state": list(states.values()), "base_optimizer_state_step": next(iter(steps), None)}

    def _stage3(self, file: TorchFile, rank: int) -> dict[str, Any]:
        masters: list[Tensor] = []
        states: dict[int, dict[str, Any]] = {}
        numbers: list[list[int]] = []
        for group in self._training.groups:
            numbers.append([])
            for members in self._sub_groups(group):
                unit = sum(-(-member.size // self._dp) for member in members)
                masters.append(file.flat("float32", unit, sliced(members, rank, self._dp, "")))
                runs = {key: sliced(members, rank, self._dp, key) for key in group.keys}
                numbers[-1].append(len(states))
                states[len(states)] = self._states(file, members, unit, runs)
        return {
            "zero_stage": zero_stage(3),
            **scaling(self._training.optim, half=self._half, all_of_it=True),
            "partition_count": self._dp,
            "optimizer_state_dict": {"state": states, "param_groups": self._param_groups(numbers)},
            "fp32_flat_groups": masters,
        }

    def _states(
        self, file: TorchFile, members: Sequence[Trained], unit: int, runs: Mapping[str, list[Run]]
    ) -> dict[str, Any]:
        """One flat parameter's entry of the base optimizer's state."""
        made: dict[str, Any] = {
            key: file.flat(self._job.tensor(name).dtype, 1, [Run(name, 0, 1)], ())
            for key, name in members[0].scalars.items()
        }
        return made | {key: file.flat("float32", unit, parts) for key, parts in runs.items()}

    def _param_groups(self, numbers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """The optimizer's groups with the flat parameters that are left of their parameters."""
        options = [group.options for group in self._training.groups]
        if self._experts is not None:
            options = [share.group.options for share in self._shares(0)]
        return [{**held, "params": list(flat)} for held, flat in zip(options, numbers, strict=True)]

    def _member_groups(self) -> list[Sequence[Trained]]:
        groups = self._training.groups
        if self._stage != 3:
            return [arranged(share.group.members, share.count, self._order).members for share in self._shares(0)]
        return [members for group in groups for members in self._sub_groups(group)]

    def _sub_groups(self, group: Group) -> list[Sequence[Trained]]:
        """A group in parts of at least ``sub_group_size`` of one rank's elements, as ZeRO-3 cuts it."""
        most = self._job.options.get("sub_group_size", SUB_GROUP_SIZE)
        if type(most) is not int or most < 1:
            raise UnusableRequest(f"option sub_group_size = {most!r} is not a number of elements")
        made: list[list[Trained]] = [[]]
        held = 0
        for member in group.members:
            if held >= most:
                made.append([])
                held = 0
            made[-1].append(member)
            held += -(-member.size // self._dp)
        return [*made]


WRITER = DeepSpeedWriter
