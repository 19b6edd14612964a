"""The live state that is checkpointed, in the forms that different engines take, and the bit-for-bit check."""

from __future__ import annotations

import abc
import concurrent.futures
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model import GPT, Shape, shape_for
from .options import Size

SEPARATOR = "/"
"""Joins the keys of a path in the nested state; occurs in no key here."""


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path; an empty container is no leaf."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + SEPARATOR))
        else:
            flat[path] = value
    return flat


class LiveState(abc.ABC):
    """What is saved and restored.  Every form aliases the same live tensors."""

    @abc.abstractmethod
    def live(self) -> dict[str, Any]:
        """The objects themselves, for engines that take those."""

    @abc.abstractmethod
    def nested(self) -> dict[str, Any]:
        """State dicts, made anew as a user makes them for every save."""

    @abc.abstractmethod
    def fill(self, nested: Mapping[str, Any]) -> None:
        """Copy a loaded state, of the form of `nested()`, into the live tensors."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Live tensors by path in `nested()`."""
        return {path: leaf for path, leaf in flatten(self.nested()).items() if isinstance(leaf, torch.Tensor)}

    @torch.no_grad()
    def fill_flat(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Copy loaded tensors, by the paths of `tensors()`, into the live ones; all of them must be there."""
        for path, tensor in self.tensors().items():
            tensor.copy_(loaded[path])

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @torch.no_grad()
    def scramble(self) -> None:
        """Overwrite every tensor, so that bytes which a restore fails to fill are seen (and all memory is touched)."""
        for tensor in self.tensors().values():
            tensor.fill_(77)

    def settle(self) -> None:
        """Wait for what a device still has to do, so that a clock that is read next tells the truth."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def digests(self) -> dict[str, str]:
        """A SHA-256 of every tensor's bytes, by path."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            tensors = self.tensors()
            return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Paths whose digests differ or are on one side only, sorted."""
    return sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))


class TrainingState(LiveState):
    """A GPT and its AdamW, whose state exists from the start so that it can be saved before the first step."""

    def __init__(self, shape: Shape, device: str, seed: int) -> None:
        self.shape = shape
        self.seed = seed
        self.model = GPT(shape).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state before the first step, in place, the same bits every time."""
        self.model.initialise(self.seed)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def live(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optimizer}

    def nested(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    @torch.no_grad()
    def fill(self, nested: Mapping[str, Any]) -> None:
        self.model.load_state_dict(nested["model"])
        own: dict[int, dict[str, torch.Tensor]] = self.optimizer.state_dict()["state"]
        for number, state in own.items():
            for name, tensor in state.items():
                tensor.copy_(nested["optim"]["state"][number][name])


class TensorState(LiveState):
    """Plain tensors in a dict, for workloads in which nothing trains."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.named = tensors

    def live(self) -> dict[str, Any]:
        return {"tensors": self.named}

    def nested(self) -> dict[str, Any]:
        return {"tensors": dict(self.named)}

    @torch.no_grad()
    def fill(self, nested: Mapping[str, Any]) -> None:
        for name, tensor in self.named.items():
            tensor.copy_(nested["tensors"][name])

    @torch.no_grad()
    def advance(self) -> None:
        """Change every tensor in place, as an update does."""
        for tensor in self.named.values():
            tensor.add_(1)


def gpt_state(size: Size, state_bytes: int | None, device: str, seed: int) -> TrainingState:
    """The training state of the size's GPT, or of one with about `state_bytes`."""
    torch.manual_seed(seed)
    return TrainingState(shape_for(size, state_bytes), device, seed)


def gpt_like_tensors(size: Size, state_bytes: int | None, device: str) -> TensorState:
    """Tensors shaped like a GPT's weights and moments, filled with their own numbers."""
    with torch.device("meta"):
        model: nn.Module = GPT(shape_for(size, state_bytes))
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}:{kind}"] = torch.arange(parameter.numel(), dtype=torch.float32, device=device).view(
                parameter.shape
            )
    return TensorState(tensors)


def small_tensors(count: int) -> TensorState:
    """`count` tensors of 64 floats, filled with their own numbers."""
    return TensorState({f"t{i:06d}": torch.arange(i, i + 64, dtype=torch.float32) for i in range(count)})
