"""Real text that is on every machine: the sources of Python's own standard library, as token numbers."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch


def tokens(vocabulary: int, count: int) -> torch.Tensor:
    """The first `count` tokens of the text: int64[count].

    With at most 256 words in the vocabulary a token is a byte, else a pair of bytes folded into the vocabulary.
    """
    bytes_per_token = 1 if vocabulary <= 256 else 2
    wanted_bytes = count * bytes_per_token
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= wanted_bytes:
            break
    while len(text) < wanted_bytes:
        text += text or b"\n"
    raw = torch.frombuffer(text[:wanted_bytes], dtype=torch.uint8).to(torch.int64)
    if bytes_per_token == 2:
        raw = raw[0::2] * 256 + raw[1::2]
    return raw % vocabulary
