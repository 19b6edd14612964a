"""The optimizer of a job without ZeRO (stage 0): all of it in the one model file, each parameter by its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.sources.deepspeed.classes import scale_of
from ckptengine.sources.deepspeed.training import Trained, Training
from ckptengine.sources.deepspeed.write_flat import FlatOrder, arranged
from ckptengine.sources.emit import Tensor
from ckptengine.sources.torchrecords import Run, TorchFile
from ckptengine.sources.writer import Job

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def precision_of(job: Job, training: Training) -> str:
    """The element type that the job trains in; DeepSpeed looks for files of other names in bfloat16.

    Option ``precision``, else what the trained weights are, the DeepSpeed config says, or the other weights are.
    """
    asked = job.options.get("precision")
    if asked is not None:
        if asked not in PRECISIONS:
            raise UnusableRequest(f"option precision = {asked!r} is none of {', '.join(PRECISIONS)}")
        return PRECISIONS[str(asked)]
    trained = {member.name for member in training.trained}
    config = training.values.get("ds_config")
    held = [{job.tensor(training.weights[name]).dtype for name in trained if name in training.weights}]
    held.append({dtype for short, dtype in PRECISIONS.items() if _enabled(config, short)})
    held.append({job.tensor(tensor).dtype for name, tensor in training.weights.items() if name not in trained})
    for dtypes in held:
        for short in ("bf16", "fp16"):
            if PRECISIONS[short] in dtypes:
                return PRECISIONS[short]
    return PRECISIONS["fp32"]


def _enabled(config: object, section: str) -> bool:
    held = config.get(section) if isinstance(config, dict) else None
    return isinstance(held, dict) and held.get("enabled") is True


def is_fused(job: Job, training: Training, stage: int) -> bool:
    """Whether the job's Adam is a fused one: 16-bit training without ZeRO then keeps one flat buffer for each group."""
    asked = job.options.get("fused", training.optim.get("fused", False))
    if not isinstance(asked, bool):
        raise UnusableRequest(f"option fused = {asked!r} is neither true nor false")
    return asked and stage == 0 and precision_of(job, training) != "float32"


def whole_optimizer(job: Job, training: Training, file: TorchFile) -> dict[str, Any]:
    """What a stage-0 model file holds under ``optimizer``; its storages go into ``file``.

    In 16-bit training that is the base optimizer's state beside fp32 copies and the loss scale, else that state itself.
    """
    if is_fused(job, training, 0):
        return _fused_optimizer(job, training, file)
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    for group in training.groups:
        positions = range(len(states), len(states) + len(group.members))
        states |= {at: _state(job, file, member) for at, member in zip(positions, group.members, strict=True)}
        groups.append({**group.options, "params": list(positions)})
    base = {"state": {at: state for at, state in states.items() if state}, "param_groups": groups}
    precision = precision_of(job, training)
    if precision == "float32":
        return base
    copies = [[_as_float32(file, member, member.master) for member in group.members] for group in training.groups]
    return {
        **scale_of(training.optim, half=precision == "float16", steps=job.step or 0),
        "optimizer_state_dict": base,
        "fp32_groups": copies,
    }


def _fused_optimizer(job: Job, training: Training, file: TorchFile) -> dict[str, Any]:
    """The same with one flat parameter for each group."""
    half = precision_of(job, training) == "float16"
    states: dict[int, dict[str, Any]] = {}
    copies: list[Tensor] = []
    for number, group in enumerate(training.groups):
        flat = arranged(group.members, 1, FlatOrder())
        copies.append(file.flat("float32", flat.size, flat.runs(0, flat.size, "")))
        states[number] = {
            key: file.flat(job.tensor(name).dtype, 1, [Run(name, 0, 1)], ())
            for key, name in group.members[0].scalars.items()
        } | {key: file.flat("float32", flat.size, flat.runs(0, flat.size, key)) for key in group.keys}
    groups = [{**group.options, "params": [number]} for number, group in enumerate(training.groups)]
    return {
        **scale_of(training.optim, half=half, steps=job.step or 0),
        "optimizer_state_dict": {"state": {at: state for at, state in states.items() if state}, "param_groups": groups},
        "fp32_groups_flat": copies,
        "clip_grad": _clipping(training),
    }


def _clipping(training: Training) -> float:
    """The gradient clipping, without which such a job does not load."""
    config = training.values.get("ds_config")
    known = training.optim.get("clip_grad", config.get("gradient_clipping", 0.0) if isinstance(config, dict) else 0.0)
    return float(known) if isinstance(known, int | float) else 0.0


def _state(job: Job, file: TorchFile, member: Trained) -> dict[str, Any]:
    made: dict[str, Any] = {
        key: file.flat(job.tensor(name).dtype, 1, [Run(name, 0, 1)], ()) for key, name in member.scalars.items()
    }
    return made | {key: _as_float32(file, member, name) for key, name in member.states.items()}


def _as_float32(file: TorchFile, member: Trained, name: str) -> Tensor:
    return file.flat("float32", member.size, [Run(name, 0, member.size)], member.shape)


def trained_weights(job: Job, training: Training) -> Mapping[str, tuple[str, str]]:
    """For every trained parameter the tensor that becomes its weight, and the element type that it is written in.

    Without 16-bit training the optimizer updates the weights themselves, so these are the master copies.
    """
    precision = precision_of(job, training)
    chosen: dict[str, tuple[str, str]] = {}
    for member in training.trained:
        source = member.master if precision == "float32" else training.weights.get(member.name, member.master)
        chosen[member.name] = (source, precision)
    return chosen
