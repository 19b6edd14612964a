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
_STATIC, _DYNAMIC_KIND = "LossScaler", "DynamicLossScaler"
_NO_SCALE = {"cur_scale": 1.0, "dynamic": False}
_SCALE = ("cur_scale", "cur_iter")
_DYNAMIC_SCALE = ("last_overflow_iter", "scale_factor", "scale_window")


def zero_stage(stage: int) -> Call:
    """A member of ``ZeroStageEnum``."""
    return Call(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (stage,))


def fragment_address(start: int, numel: int) -> Instance:
    """Where a parameter lies in a rank's flat partition."""
    return Instance(Global("deepspeed.utils.tensor_fragment", "fragment_address"), {"numel": numel, "start": start})


def scaling(optim: Mapping[str, Any], *, half: bool, all_of_it: bool) -> dict[str, Any]:
    """The loss scaler and gradient clipping that ZeRO's optimizer files hold, as far as the source knows them.

    What it does not know is left out, so that the job keeps its own; with ``all_of_it`` (ZeRO-3 takes nothing less) the
    scaler is then DeepSpeed's default for the precision.
    """
    scaler = _known_scaler(optim) if half else Instance(Global(_SCALER_MODULE, _STATIC), dict(_NO_SCALE))
    if scaler is None and all_of_it:
        scaler = Instance(Global(_SCALER_MODULE, _DYNAMIC_KIND), dict(_DYNAMIC))
    made: dict[str, Any] = {"overflow": False}
    if scaler is not None:
        made |= {"loss_scaler": scaler, "dynamic_loss_scale": scaler.kind.name == _DYNAMIC_KIND}
    if isinstance(optim.get("clip_grad"), int | float) and not all_of_it:
        made["clip_grad"] = optim["clip_grad"]
    return made


def _known_scaler(optim: Mapping[str, Any]) -> Instance | None:
    """The loss scaler of a source that was trained in float16: one that does not scale says that it was not."""
    known = optim.get("loss_scaler")
    kind = str(known.get("__class__")) if isinstance(known, dict) else ""
    state = known.get("state") if isinstance(known, dict) else None
    if kind.startswith(_SCALER_MODULE + ".") and isinstance(state, dict) and dict(state) != _NO_SCALE:
        restored = {key: _dtype(value) for key, value in state.items()}
        return Instance(Global(_SCALER_MODULE, kind[len(_SCALER_MODULE) + 1 :]), restored)
    scale = optim.get("cur_scale")
    if not isinstance(scale, int | float):  # written without ZeRO, which keeps the numbers themselves
        return None
    if optim.get("dynamic_loss_scale") is not True:
        static = {"cur_scale": scale, "dynamic": False, "dtype": Global("torch", "float16")}
        return Instance(Global(_SCALER_MODULE, _STATIC), static) if scale != 1 else None
    kept = {key: optim[key] for key in (*_SCALE, *_DYNAMIC_SCALE) if key in optim}
    return Instance(Global(_SCALER_MODULE, _DYNAMIC_KIND), {**_DYNAMIC, **kept})


def scale_of(optim: Mapping[str, Any], *, half: bool, steps: int) -> dict[str, Any]:
    """The loss scale as 16-bit training without ZeRO keeps it: the source's, or DeepSpeed's default."""
    known = _known_scaler(optim) if half else None
    held = known.state if known is not None and isinstance(known.state, dict) else _DYNAMIC if half else _NO_SCALE
    dynamic = held["dynamic"] is True
    made: dict[str, Any] = {"dynamic_loss_scale": dynamic, "cur_scale": held["cur_scale"]}
    made["cur_iter"] = held["cur_iter"] if dynamic else optim.get("cur_iter", steps)
    return made | ({key: held[key] for key in _DYNAMIC_SCALE} if dynamic else {})


def _dtype(value: object) -> object:
    if isinstance(value, str) and value.startswith("torch."):
        return Global("torch", value[len("torch.") :])
    return value
