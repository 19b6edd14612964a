"""The process's random streams, by name: ``python``, ``numpy``, ``torch.cpu`` and ``torch.cuda.<i>``."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ckptengine.errors import StateMismatch, UnreadableFormat
from ckptengine.state.decoding import Decoder
from ckptengine.state.encoding import Encoder, Json, dumps
from ckptengine.state.scalars import (
    encode_python_state,
    encode_torch_state,
    read_python_state,
    read_torch_state,
)

Policy = Literal["exact", "available"]


def capture() -> dict[str, Json]:
    """The state of every stream of this process, encoded.  A CUDA device counts once torch has initialised CUDA."""
    streams: dict[str, Json] = {
        "python": encode_python_state(random.getstate()),
        "numpy": Encoder().encode(np.random.get_state(legacy=False), "random.numpy"),
        "torch.cpu": encode_torch_state(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            streams[f"torch.cuda.{index}"] = encode_torch_state(torch.cuda.get_rng_state(index))
    return streams


def problems(streams: object, policy: Policy = "exact") -> list[str]:
    """What keeps ``streams`` from being restored here.

    ``exact``: a saved device that this process lacks is a problem.  ``available``: devices are restored where both
    sides have them; the rest keep their state.
    """
    if not isinstance(streams, Mapping):
        return ["random: the saved random streams are not a mapping"]
    found: list[str] = []
    known = {"python", "numpy", "torch.cpu"}
    saved_devices = {name for name in streams if name not in known}
    for name in sorted(known - set(streams)):
        found.append(f"random.{name}: this stream was not saved")
    if policy == "exact":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = {f"torch.cuda.{index}" for index in range(count)}
        found += [
            f"random.{name}: saved for a device that this process does not have; restore with random=False or "
            f"the policy 'available'"
            for name in sorted(saved_devices - here)
        ]
    return found


def restore(streams: Mapping[str, Json], policy: Policy = "exact") -> None:
    """Put the saved states back, all of them read before any is set.

    Must be the last act of a restore: whatever draws a random number afterwards would move the stream.  Raises
    `StateMismatch` where `problems` has any, `UnreadableFormat` for malformed states; then nothing was changed.
    """
    found = problems(streams, policy)
    if found:
        raise StateMismatch("the random streams cannot be restored: " + "; ".join(found), tuple(found))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        python_state = read_python_state(streams["python"])
        numpy_state: Any = Decoder().decode(streams["numpy"])
        cpu = read_torch_state(streams["torch.cpu"])
        cuda = {i: read_torch_state(streams[f"torch.cuda.{i}"]) for i in range(count) if f"torch.cuda.{i}" in streams}
        probe = np.random.RandomState()
        probe.set_state(numpy_state)
        torch.Generator().set_state(cpu)
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
        raise UnreadableFormat(f"the saved random streams are malformed: {error}") from error
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    for index, state in cuda.items():
        torch.cuda.set_rng_state(state, index)


def derive(by_rank: Sequence[Mapping[str, Json]], rank: int, world: int) -> dict[str, Json]:
    """Streams for ``rank`` of a run that goes on with another number of ranks, encoded as `capture` does.

    They are a function of all saved streams (``by_rank``, in the order of the saved ranks), ``rank`` and ``world``
    alone, so that a restart repeats them, and differ between ranks.
    """
    text = dumps([[dict(sorted(streams.items())) for streams in by_rank], rank, world])
    numpy_words = np.frombuffer(_seed(text, "numpy", 32), "<u4").astype(np.int64)
    streams: dict[str, Json] = {
        "python": encode_python_state(random.Random(_seed(text, "python", 32)).getstate()),
        "numpy": Encoder().encode(np.random.RandomState(numpy_words).get_state(legacy=False), "random.numpy"),
        "torch.cpu": encode_torch_state(_torch_generator(text, "cpu").get_state()),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        streams[f"torch.cuda.{index}"] = encode_torch_state(_torch_generator(text, f"cuda:{index}").get_state())
    return streams


def _seed(text: str, stream: str, size_bytes: int) -> bytes:
    """Each stream its own: Python's and numpy's generators give the same numbers from the same seed."""
    return hashlib.blake2b(f"{stream}\n{text}".encode("ascii"), digest_size=size_bytes).digest()


def _torch_generator(text: str, device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(int.from_bytes(_seed(text, device, 7), "little"))
