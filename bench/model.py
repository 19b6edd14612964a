"""A small GPT, so that the loop that is slowed down is a real one."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional

from .options import PRESETS, Size

BYTES_PER_PARAMETER = 12
"""fp32 weight and AdamW's two moments."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a GPT and of one batch of its training."""

    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int

    @property
    def heads(self) -> int:
        """Attention heads, of width 64 where the width allows it."""
        return max(1, self.width // 64)


def shape_for(size: Size, state_bytes: int | None) -> Shape:
    """The size's GPT, or one whose training state takes about `state_bytes`."""
    preset = PRESETS[size]
    shape = Shape(
        layers=preset.layers,
        width=preset.width,
        vocabulary=preset.vocabulary,
        context=preset.context,
        batch=preset.batch,
    )
    if state_bytes is None:
        return shape
    parameters = state_bytes // BYTES_PER_PARAMETER
    layers = 12 if parameters > 40_000_000 else shape.layers
    width = max(16, round((parameters / (12 * layers)) ** 0.5))
    if width >= 64:
        width = round(width / 64) * 64
    elif width % 2:
        width += 1
    return dataclasses.replace(shape, layers=layers, width=width, vocabulary=256)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.norm_2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[batch, context, width] to the same."""
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, context, width))
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm_2(x))))
        return out


class GPT(nn.Module):
    """A decoder with tied embedding and head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting int64[batch, context] targets from inputs."""
        x = self.embedding(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        loss: torch.Tensor = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all weights in place, the same for the same seed."""
        device = next(self.parameters()).device
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
