"""C++ CPU kernels: sources, build, choice of the instruction set, loading.

Importing this package imports neither torch nor the library.
"""

from sgl_psa_kernels._native.loader import load, native_available

__all__ = ["load", "native_available"]
