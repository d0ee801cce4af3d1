"""Tensors on disk in the safetensors format, written and read one at a time.

`safetensors.torch.save_file` copies every tensor into Python bytes before it writes, so saving a model takes its size
in memory again; what `safe_open` gives lies in a mapping of the file, whose pages stay resident beside the copies. Here
both ways go through the tensor's own memory. The library checks the header.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 8
_PIECE = 1 << 24
"""Bytes hashed and written at a time."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write tensors by name and bring them to disk.

    One tensor at a time is copied to the CPU, and only if it lies elsewhere or is not contiguous.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: If it cannot be written.
        KeyError: If safetensors has no name for a dtype.
    """
    header, offset = {}, 0
    # By descending item size every tensor begins at a multiple of its item size, as the format asks for.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in (len(text).to_bytes(8, "little"), text, *_raw(tensors[name] for name in order)):
            digest.update(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor, on the CPU, one at a time.

    Each lies in memory of PyTorch's own. Where it lies in the file would decide how it is aligned, and matrix products
    round otherwise for another alignment.

    Raises:
        SafetensorError: If it is no such file.
    """
    with safe_open(str(path), framework="pt", device="cpu"):  # type: ignore[no-untyped-call]
        pass  # shapes, offsets and the file's size agree
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = torch.empty(described["shape"], dtype=_DTYPES[described["dtype"]])
            rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            file.seek(8 + length + described["data_offsets"][0])
            while rest:
                if not (count := file.readinto(rest[:_PIECE])):
                    raise OSError(f"{path} ends within {name}")
                rest = rest[count:]
            yield name, tensor


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _raw(tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), _PIECE):
            yield memoryview(flat[start : start + _PIECE])  # type: ignore[arg-type]
