"""Identity of a checkpoint's weights: a hash that is cheap for large files and exact for small ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_FILE_BYTES = 256 << 20
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own bound


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files, sorted by name: safetensors if there are any, else PyTorch's."""
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def fingerprint(files: list[Path]) -> str:
    """SHA-256, in hex, over each file's name, size and contents.

    A file of 256 MiB or more counts with its safetensors header (names, types, shapes, offsets of all tensors) and 64
    chunks of 1 MiB, evenly spaced from first byte to last: a retrained or requantized checkpoint changes everywhere,
    but an edit between two samples goes unseen. Raises OSError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size < _WHOLE_FILE_BYTES:
                while chunk := stream.read(_SAMPLE_BYTES):
                    digest.update(chunk)
                continue
            header_bytes = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
            digest.update(stream.read(min(header_bytes, _MAX_HEADER_BYTES)))
            for sample in range(_NUM_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
