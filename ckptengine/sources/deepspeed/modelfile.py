"""The model file of a DeepSpeed checkpoint: weights, what says where they lie, and the values that the user saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptengine.sources.deepspeed.training import Trained, Training
from ckptengine.sources.deepspeed.write_plain import trained_weights, whole_optimizer
from ckptengine.sources.emit import Tensor, size
from ckptengine.sources.nesting import copied, put_tensors
from ckptengine.sources.torchrecords import Run, TorchFile
from ckptengine.sources.writer import Job

DS_VERSION = "0.16.0"
"""Written where the source does not say which DeepSpeed wrote it; the layout is that of every version since."""

_RESERVED = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "num_experts",
    "universal_checkpoint_info", "data_sampler", "random_ltd", "ds_autoep_layers",
    "ds_config", "ds_version", "global_steps", "global_samples", "skipped_steps", "lr_scheduler",
}  # fmt: skip


def ds_version(training: Training) -> str:
    """The version of DeepSpeed that the source names, or a default."""
    known = training.values.get("ds_version")
    return known if isinstance(known, str) and known else DS_VERSION


def model_states(
    job: Job,
    training: Training,
    file: TorchFile,
    groups: Sequence[Sequence[Trained]],
    stage: int,
    rank: int,
    ranks: int,
) -> dict[str, Any]:
    """The dictionary of one rank's model file; its storages go into ``file``.

    ZeRO-3's files hold placeholders for parameters, pieces of the frozen ones, and whole buffers; stage 0's also hold
    the optimizer.
    """
    values = copied(training.values)
    if stage == 3:
        placeholders = [*(member.name for member in training.trained), *training.frozen]
        whole = {name: file.flat(_dtype(job, training, name), 0, []) for name in placeholders}
        whole |= {name: file.whole(job, training.weights[name]) for name in training.buffers}
        frozen = {name: _piece(job, file, training.weights[name], rank, ranks) for name in training.frozen}
    else:
        chosen = trained_weights(job, training) if stage == 0 else {}
        stored = {name: chosen.get(name, (tensor, None)) for name, tensor in _stored(training)}
        whole = {name: file.whole(job, tensor, dtype) for name, (tensor, dtype) in stored.items()}
        frozen = {name: whole[name] for name in training.frozen} if stage == 2 else {}
    shapes = {name: size(job.tensor(training.weights[name]).shape) for name in frozen}
    ours: dict[str, Any] = {
        "module": {**whole, **{alias: whole[name] for alias, name in training.aliases.items() if name in whole}},
        "buffer_names": list(training.buffers),
        "optimizer": None,
        "param_shapes": [{member.name: size(member.shape) for member in group} for group in groups],
        "frozen_param_shapes": shapes or None,
        "shared_params": {alias: name for alias, name in training.aliases.items() if name in whole},
        "frozen_param_fragments": frozen or None,
        "lr_scheduler": values.get("lr_scheduler"),
        "data_sampler": values.get("data_sampler"),
        "random_ltd": values.get("random_ltd"),
        "skipped_steps": values.get("skipped_steps", 0),
        "global_steps": job.step or 0,
        "global_samples": values.get("global_samples", 0),
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": values.get("ds_config", {}),
        "ds_version": ds_version(training),
    }
    if stage == 0:
        ours |= {"optimizer": whole_optimizer(job, training, file), "shared_params": None}
    made = {**{key: value for key, value in values.items() if key not in _RESERVED}, **ours}
    put_tensors(job, made, {name: file.whole(job, name) for name in training.others})
    return made


def _stored(training: Training) -> list[tuple[str, str]]:
    """Weights by name; a parameter that is held as a master only is its master."""
    masters = [(member.name, member.master) for member in training.trained if member.name not in training.weights]
    return [*training.weights.items(), *masters]


def _dtype(job: Job, training: Training, name: str) -> str:
    return job.tensor(training.weights[name]).dtype if name in training.weights else "float32"


def _piece(job: Job, file: TorchFile, name: str, rank: int, ranks: int) -> Tensor:
    tensor = job.tensor(name)
    piece = -(-tensor.size // ranks)
    start, stop = min(rank * piece, tensor.size), min((rank + 1) * piece, tensor.size)
    return file.flat(tensor.dtype, piece, [Run(name, start, stop)])
