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
    if half:
        return Instance(Global(_SCALER_MODULE, "DynamicLossScaler"), dict(_DYNAMIC))
    return Instance(Global(_SCALER_MODULE, "LossScaler"), {"cur_scale": 1.0, "dynamic": False})


def _dtype(value: object) -> object:
    if isinstance(value, str) and value.startswith("torch."):
        return Global("torch", value[len("torch.") :])
    return value
