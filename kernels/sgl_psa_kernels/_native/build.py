"""Compile the CPU kernels. Needs a C++17 compiler; does not import torch.

``build_all`` is for building a package; ``build_cached`` compiles on first use into a cache folder.
The OpenMP runtime is left unresolved on purpose: the loader provides the one that the process has.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from sgl_psa_kernels._native.isa import ISA, buildable

SOURCE_DIR = Path(__file__).parent / "src"
PREBUILT_DIR = Path(__file__).parent / "prebuilt"

COMMON_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)


class BuildError(RuntimeError):
    """The kernels cannot be compiled; the message says what to install or shows the error."""


def compiler() -> list[str]:
    """The C++ compiler command: $CXX, else g++, else c++.

    Raises:
        BuildError: no compiler is installed.
    """
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["g++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    if chosen:
        raise BuildError(f"CXX={chosen} is not an executable; set CXX to a C++17 compiler")
    raise BuildError(
        "no C++ compiler found; install one (Debian/Ubuntu: apt-get install g++) or set CXX"
    )


@cache
def source_hash() -> str:
    """Hash of the sources and flags: a library is current exactly if it carries this hash."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((COMMON_FLAGS, [(i.name, i.compiler_flags) for i in buildable()])).encode())
    return digest.hexdigest()[:16]


def library_name(isa: ISA) -> str:
    """File name of the library of an instruction set, for the sources as they are."""
    return f"psa_{isa.name}_{source_hash()}.so"


def cache_dir() -> Path:
    """Folder of libraries compiled on first use."""
    override = os.environ.get("SGL_PSA_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sgl_psa"


def build(isa: ISA, target: Path) -> None:
    """Compile one library. ``target`` appears complete or not at all.

    Raises:
        BuildError: no compiler, or the compiler failed.
    """
    command = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        sources = sorted(SOURCE_DIR.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        flags = [*COMMON_FLAGS, *isa.compiler_flags]
        jobs = [
            [*command, *flags, "-c", str(source), "-o", str(output)]
            for source, output in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(_run, jobs))
        library = Path(folder) / target.name
        _run([*command, "-shared", *map(str, objects), "-o", str(library)])
        os.replace(library, target)


def build_all(out_dir: str | os.PathLike[str] = PREBUILT_DIR) -> list[Path]:
    """Compile every instruction set of this architecture into ``out_dir``.

    The loader looks for prebuilt libraries in ``_native/prebuilt`` of the installed package.
    Libraries of other source versions in ``out_dir`` are removed.

    Raises:
        BuildError: no compiler, or the compiler failed.
    """
    folder = Path(out_dir)
    targets = [folder / library_name(isa) for isa in buildable()]
    for isa, target in zip(buildable(), targets, strict=True):
        if not target.exists():
            build(isa, target)
    for old in set(folder.glob("psa_*.so")) - set(targets):
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
    return targets


def build_cached(isa: ISA) -> Path:
    """Path of the library of ``isa``: prebuilt, from the cache, or compiled into the cache now.

    Safe when several processes start at once: each compiles in a folder of its own, and the last
    rename wins with an equal file.

    Raises:
        BuildError: it has to be compiled and cannot be.
    """
    prebuilt = PREBUILT_DIR / library_name(isa)
    if prebuilt.exists():
        return prebuilt
    target = cache_dir() / _compiler_key(tuple(compiler())) / library_name(isa)
    if not target.exists():
        try:
            build(isa, target)
        except OSError as error:
            raise BuildError(
                f"cannot write the compiled kernels to {target.parent} ({error}); "
                "set SGL_PSA_CACHE_DIR to a writable folder"
            ) from error
    return target


def _compiler_key(command: Sequence[str]) -> str:
    """Cache key of a compiler: its version output."""
    version = _run([*command, "--version"])
    return hashlib.sha256(f"{shlex.join(command)}\n{version}".encode()).hexdigest()[:12]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BuildError(
            f"compiling the kernels failed: {shlex.join(command)}\n{tail}\n"
            "(an older compiler may lack flags; SGL_PSA_CPU_ISA chooses an older instruction set)"
        )
    return done.stdout
