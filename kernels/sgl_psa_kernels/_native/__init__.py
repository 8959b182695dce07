"""C++ CPU kernels: sources, build, choice of the instruction set, loading."""


def native_available() -> tuple[bool, str]:
    """Whether the native library can be used, and if not, what to install."""
    return False, "the C++ kernels are not built"


def load() -> None:
    """Load the native library."""
    raise RuntimeError(native_available()[1])
