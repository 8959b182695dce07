"""One OpenMP runtime per process: find the one that torch loaded and make its symbols visible."""

import ctypes
import ctypes.util
import re
from pathlib import Path

_RUNTIME = re.compile(r"/(libgomp|libiomp5|libomp)[^/]*\.so[^/]*$")


def load_runtime() -> None:
    """Load the process's OpenMP runtime with global symbols.

    The kernels refer to it without naming a file. torch ships its own copy; a second copy in the
    process would have its own threads.

    Raises:
        OSError: there is no OpenMP runtime at all.
    """
    import torch

    folder = Path(torch.__file__).parent
    shipped = [
        str(path)
        for place in (folder / "lib", folder.parent / "torch.libs")
        if place.is_dir()
        for path in sorted(place.iterdir())
        if _RUNTIME.search(str(path))
    ]
    candidates = [*_loaded(), *shipped, ctypes.util.find_library("gomp"), "libgomp.so.1"]
    error: OSError | None = None
    for candidate in candidates:
        if candidate is None:
            continue
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as failure:
            error = failure
    raise OSError(
        f"no OpenMP runtime found ({error}); install it (Debian/Ubuntu: apt-get install libgomp1)"
    )


def _loaded() -> list[str]:
    """OpenMP runtimes that are mapped into this process; torch's first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if _RUNTIME.search(line)}
    return sorted(paths, key=lambda path: ("torch" not in path, path))
