"""Tensors reach the disk and come back bit by bit, in memory of their own size and no more."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trace_hydra.store import tensors
from trace_hydra.store.tensors import read_tensors, tensor_bytes, write_tensors

DTYPES = sorted(tensors._NAMES, key=str)


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def of(dtype, *shape):
    """Random bytes as a tensor; as float, NaN and infinities among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size * torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def back(given, path):
    return dict(read_tensors(path)) if write_tensors(given, path) else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype, shape, tmp_path):
    given = {"odd": of(torch.uint8, 3), "x": of(dtype, *shape)}
    found = back(given, tmp_path / "file")
    assert found.keys() == given.keys() and all(same(given[name], found[name]) for name in given)
    library = load_file(tmp_path / "file")
    assert all(same(given[name], library[name]) for name in given)


@pytest.mark.parametrize(
    "given",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(24.0).reshape(2, 3, 4)[:, ::2, 1:],
        torch.arange(3.0).expand(4, 3),
        torch.arange(6.0)[3:],
        torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
        torch.arange(4.0, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "view", "parameter", "in a graph"],
)
def test_views_and_parameters_are_stored_as_what_they_show(given, tmp_path):
    (found,) = back({"x": given}, tmp_path / "file").values()
    assert same(found, given) and found.is_contiguous() and not found.requires_grad


def test_the_hash_is_the_file_s_and_does_not_depend_on_the_order_given(tmp_path):
    given = {"b": of(torch.float32, 9), "a": of(torch.bfloat16, 3), "c": of(torch.int64, 2), "d": of(torch.bool, 5)}
    hashes = [write_tensors(one, tmp_path / "file") for one in (given, dict(sorted(given.items())))]
    assert hashes[0] == hashes[1] == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert tensor_bytes(given) == 9 * 4 + 3 * 2 + 2 * 8 + 5


def test_no_tensors_make_a_file_too(tmp_path):
    assert back({}, tmp_path / "file") == {} and load_file(tmp_path / "file") == {}


def test_files_of_the_library_are_read_with_their_metadata(tmp_path):
    given = {"x": of(torch.float16, 4, 4), "y": of(torch.int8, 3)}
    save_file(given, tmp_path / "file", metadata={"format": "pt"})
    found = dict(read_tensors(tmp_path / "file"))
    assert found.keys() == given.keys() and all(same(given[name], found[name]) for name in given)


def test_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    """Pieces of 64 bytes; 1003 bytes are 15 of them and a rest of 43."""
    monkeypatch.setattr(tensors, "_PIECE", 64)
    given = {"x": of(torch.uint8, 1003), "y": of(torch.float64, 100)}
    found = back(given, tmp_path / "file")
    assert all(same(given[name], found[name]) for name in given)


@pytest.mark.parametrize("cut", [1, 200, 395, 407])
def test_a_file_that_is_cut_or_overstates_itself_is_refused(cut, tmp_path):
    write_tensors({"x": of(torch.float32, 80)}, tmp_path / "file")
    raw = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(raw[: len(raw) - cut])
    with pytest.raises(SafetensorError):
        dict(read_tensors(tmp_path / "file"))
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 40)
    with pytest.raises(SafetensorError):
        dict(read_tensors(tmp_path / "file"))


def test_what_is_read_lies_as_pytorch_would_put_it(tmp_path):
    """64 bytes are PyTorch's own alignment; in the file, the second tensor begins at an odd multiple of 4."""
    write_tensors({"a": of(torch.float32, 1), "b": of(torch.float32, 64)}, tmp_path / "file")
    assert all(tensor.data_ptr() % 64 == 0 for _, tensor in read_tensors(tmp_path / "file"))


MEASURE = """
import sys
from pathlib import Path
import torch
from trace_hydra.store.tensors import read_tensors, write_tensors

path, size = Path(sys.argv[2]), 8 * 12_500_000 * 4
names = [f"w{number}" for number in range(8)] if sys.argv[1] == "write" else []
given = {name: torch.full((12_500_000,), 1.5) for name in names}
torch.zeros(1000).sum()
def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = memory("VmRSS")
if given:
    write_tensors(given, path)
else:
    found = dict(read_tensors(path))
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/status to read the peak from")
def test_writing_takes_no_memory_and_reading_the_size_of_the_file(tmp_path):
    """400 MB: peak host memory grows by under 10 % to write them (pieces of 16 MB), by at most 1.1 times to read.

    VmHWM, because `ru_maxrss` of a child begins with what its parent had.
    """
    grown = {}
    for which in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, which, str(tmp_path / "file")], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        grown[which] = float(done.stdout)
    assert grown["write"] <= 0.1 and 0.95 <= grown["read"] <= 1.1, grown
