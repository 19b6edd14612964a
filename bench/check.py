"""The bit-for-bit check that follows every measured save."""

from __future__ import annotations

from collections.abc import Mapping

from .engine import Engine
from .state import differences


def verify(engine: Engine, step: int, expected: Mapping[str, str]) -> str:
    """Restore the checkpoint of `step` over scrambled memory and compare digests: "ok", or what is wrong."""
    if not engine.checked:
        return "not a checkpoint"
    engine.state.scramble()
    try:
        engine.restore(step)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        return f"does not load: {type(error).__name__}: {reason}"[:300]
    wrong = differences(expected, engine.state.digests())
    if wrong:
        return f"WRONG BYTES in {len(wrong)} of {len(expected)} tensors, first {wrong[0]}"
    return "ok"
