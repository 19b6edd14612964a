"""Pack checkpoints written by make_deepspeed.py and make_megatron.py into the archives that the tests read.

``python -m tests.sources.pack_cases ARCHIVE OUT/case ...``: each case's checkpoint, and its truth as a JSON of element
types, shapes and SHA-256 digests.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from .reading import truth_of_safetensors


def main(archive: Path, cases: list[Path]) -> None:
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for case in cases:
            for path in sorted((case / "checkpoint").rglob("*")):
                if path.is_file() and path.suffix != ".py":
                    add(tar, f"{case.name}/{path.relative_to(case)}", path.read_bytes())
            truth = truth_of_safetensors(case / "truth.safetensors")
            document = {
                name.replace("module.", ""): {"dtype": dtype, "shape": shape, "sha256": digest}
                for name, (dtype, shape, digest) in sorted(truth.items())
            }
            add(tar, f"{case.name}/truth.json", json.dumps(document).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
