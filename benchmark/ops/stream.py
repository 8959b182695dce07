"""The machine's memory, in compiled loops: its streaming bandwidth, and what a prefetch costs.

torch's and numpy's sums do not reach that bandwidth in one thread, so they cannot serve as the
yardstick.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from sgl_psa_kernels._native.build import COMMON_FLAGS, BuildError, cache_dir, compiler
from sgl_psa_kernels._native.loader import choose_isa
from sgl_psa_kernels._native.openmp import load_runtime

SOURCE = Path(__file__).with_name("stream.cpp")
LINE = 64


@cache
def _library() -> ctypes.CDLL:
    """``stream.cpp`` for this CPU, compiled on first use.

    Raises:
        BuildError: no compiler, or it failed.
    """
    isa = choose_isa()
    command = [*compiler(), *COMMON_FLAGS, *isa.compiler_flags, "-shared"]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    target = cache_dir() / f"stream_{isa.name}_{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True
            )
            if done.returncode:
                raise BuildError(f"compiling {SOURCE} failed:\n{done.stderr}")
            os.replace(made, target)
    load_runtime()
    library = ctypes.CDLL(str(target))
    library.stream_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.stream_read.restype = ctypes.c_uint64
    library.prefetch_rows.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int
    ]  # fmt: skip
    library.prefetch_rows.restype = ctypes.c_float
    library.read_rows.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    ]  # fmt: skip
    library.read_rows.restype = ctypes.c_uint64
    return library


def stream_read(tensor: torch.Tensor) -> int:
    """Read every whole cache line of a contiguous CPU tensor once, with torch's thread count.

    Returns:
        The exclusive or of its 8-byte words, so that the reading cannot be left out.
    """
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    begin = -(-begin // LINE) * LINE
    lines = max(0, end - begin) // LINE
    return int(_library().stream_read(begin, lines, torch.get_num_threads()))


def prefetch_rows(
    memory: torch.Tensor, rows: torch.Tensor, *, prefetch: bool, products: bool
) -> None:
    """Request rows of 256 bytes, to the second-level cache, and multiply in between, in one thread.

    Args:
        memory: any contiguous CPU tensor; rows: int64 [N], where in its bytes each row begins.
        products: 64 products of 16 floats a row, in registers.
    """
    _library().prefetch_rows(memory.data_ptr(), rows.data_ptr(), len(rows), prefetch, products)


def read_rows(memory: torch.Tensor, rows: torch.Tensor, *, ahead: int) -> int:
    """Read rows of 256 bytes, in the order of the list, in one thread.

    Args:
        memory: contiguous CPU tensor that begins at a cache line; rows: int64 [N], where in its
            bytes each row begins, at a line.
        ahead: rows between the request of one, to the second-level cache, and its reading.

    Returns:
        The exclusive or of their 8-byte words.
    """
    return int(_library().read_rows(memory.data_ptr(), rows.data_ptr(), len(rows), ahead))
