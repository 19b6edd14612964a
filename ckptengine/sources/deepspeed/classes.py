"""DeepSpeed's own classes as its pickles name them, and values that hold instances of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptengine.sources.emit import Call, Global, Instance

_SCALER_MODULE = "deepspeed.runtime.fp16.loss_scaler"
_DYNAMIC: dict[str, object] = {
    "cur_scale": 65536.0,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 1,
    "cur_hysteresis": 1,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
    "dynamic": True,
    "dtype": Global("torch", "float16"),
}
_SCALE = ("cur_scale", "cur_iter")
_DYNAMIC_SCALE = ("last_overflow_iter", "scale_factor", "scale_window")


def zero_stage(stage: int) -> Call:
    """A member of ``ZeroStageEnum``."""
    return Call(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (stage,))


def fragment_address(start: int, numel: int) -> Instance:
    """Where a parameter lies in a rank's flat partition."""
    return Instance(Global("deepspeed.utils.tensor_fragment", "fragment_address"), {"numel": numel, "start": start})


def loss_scaler(optim: Mapping[str, Any], *, half: bool) -> Instance:
    """The loss scaler that the source had, or DeepSpeed's default for the precision."""
    known = optim.get("loss_scaler")
    kind = known.get("__class__") if isinstance(known, dict) else None
    if isinstance(known, dict) and isinstance(kind, str) and kind.startswith(_SCALER_MODULE + "."):
        state = known.get("state")
        if isinstance(state, dict):
            restored = {key: _dtype(value) for key, value in state.items()}
            return Instance(Global(_SCALER_MODULE, kind[len(_SCALER_MODULE) + 1 :]), restored)
    scale = optim.get("cur_scale")
    if half and isinstance(scale, int | float):  # written without ZeRO, which keeps the numbers themselves
        if optim.get("dynamic_loss_scale") is not True:
            static = {"cur_scale": scale, "dynamic": False, "dtype": Global("torch", "float16")}
            return Instance(Global(_SCALER_MODULE, "LossScaler"), static)
        kept = {key: optim[key] for key in (*_SCALE, *_DYNAMIC_SCALE) if key in optim}
        return Instance(Global(_SCALER_MODULE, "DynamicLossScaler"), {**_DYNAMIC, **kept})
    if half:
        return Instance(Global(_SCALER_MODULE, "DynamicLossScaler"), dict(_DYNAMIC))
    return Instance(Global(_SCALER_MODULE, "LossScaler"), {"cur_scale": 1.0, "dynamic": False})


def scale_of(optim: Mapping[str, Any], *, half: bool, steps: int) -> dict[str, Any]:
    """The loss scale as 16-bit training without ZeRO keeps it: the source's, or DeepSpeed's default."""
    known = optim.get("loss_scaler")
    state = known.get("state") if isinstance(known, dict) else None
    held = {**_DYNAMIC, **(state if isinstance(state, dict) else {}), **optim} if half else {"cur_scale": 1.0}
    dynamic = half and held.get("dynamic_loss_scale", held["dynamic"]) is True
    made: dict[str, Any] = {"dynamic_loss_scale": dynamic, "cur_scale": held["cur_scale"]}
    made["cur_iter"] = held.get("cur_iter", steps) if dynamic else steps
    return made | ({key: held[key] for key in _DYNAMIC_SCALE} if dynamic else {})


def _dtype(value: object) -> object:
    if isinstance(value, str) and value.startswith("torch."):
        return Global("torch", value[len("torch.") :])
    return value
