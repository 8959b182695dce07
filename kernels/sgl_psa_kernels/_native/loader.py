"""Choose, build if needed, and load the native library."""

import ctypes
import os
from functools import cache
from pathlib import Path

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.build import BuildError, build_cached
from sgl_psa_kernels._native.isa import ISA, by_name, supported

ISA_VARIABLE = "SGL_PSA_CPU_ISA"


def choose_isa() -> ISA:
    """The best instruction set of this CPU, or the one that $SGL_PSA_CPU_ISA forces.

    Raises:
        RuntimeError: the forced one is unknown or the CPU lacks it.
    """
    forced = os.environ.get(ISA_VARIABLE)
    usable = supported()
    if not forced:
        return usable[0]
    names = ", ".join(isa.name for isa in usable)
    try:
        isa = by_name(forced)
    except ValueError as error:
        raise RuntimeError(f"{ISA_VARIABLE}: {error}") from error
    if isa not in usable:
        raise RuntimeError(
            f"{ISA_VARIABLE}={forced}, but this CPU lacks it; unset it or choose one of {names}"
        )
    return isa


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library that :mod:`build` made and declare its functions.

    Raises:
        RuntimeError: it has another ABI version.
        OSError: it cannot be loaded.
    """
    from sgl_psa_kernels._native.openmp import load_runtime

    load_runtime()
    library = ctypes.CDLL(str(path))
    version = library.psa_abi_version()
    if version != abi.ABI_VERSION:
        raise RuntimeError(
            f"{path} has ABI version {version}, expected {abi.ABI_VERSION}; delete the file"
        )
    library.psa_isa.restype = ctypes.c_char_p
    for index, (name, struct) in enumerate(abi.FUNCTIONS.items()):
        size = library.psa_struct_size(index)
        if size != ctypes.sizeof(struct):
            raise RuntimeError(
                f"{path}: arguments of {name} have {size} bytes, {ctypes.sizeof(struct)} in "
                "abi.py; the two declarations differ"
            )
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(struct)]
        function.restype = ctypes.c_int
    return library


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    try:
        isa = choose_isa()
        return open_library(build_cached(isa)), isa.name
    except (BuildError, RuntimeError, OSError) as error:
        return None, f"the CPU kernels are not available: {error}"


def native_available() -> tuple[bool, str]:
    """Whether the CPU kernels can be used; compiles them on the first call if need be.

    Returns:
        (True, name of the instruction set) or (False, reason and what to install or change).
    """
    library, text = _load()
    return library is not None, text


def load() -> ctypes.CDLL:
    """The native library.

    Raises:
        RuntimeError: it is not available; the message says what to install or change.
    """
    library, text = _load()
    if library is None:
        raise RuntimeError(text)
    return library
