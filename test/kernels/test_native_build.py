"""Building, caching, choosing and loading the native library."""

import os
import re
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sgl_psa_kernels._native import abi, build, isa, loader

FAKE_COMPILER = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0"; exit 0; fi
while [ "$#" -gt 1 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
echo half > "$out"; sleep 0.05; echo half >> "$out"
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and no prebuilt libraries."""
    monkeypatch.setenv("SGL_PSA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT_DIR", tmp_path / "prebuilt")
    return tmp_path


@pytest.fixture
def fake_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = fresh / "fake-c++"
    path.write_text(FAKE_COMPILER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def python(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_builds_that_start_together_leave_one_complete_file(fake_compiler: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: build.build_cached(isa.ISAS[-1]), range(6)))
    (path,) = paths
    assert path.read_text() == "half\nhalf\n"
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_is_keyed_by_compiler_and_sources(
    fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build_cached(isa.ISAS[-1])
    assert build.build_cached(isa.ISAS[-1]) == first
    fake_compiler.write_text(FAKE_COMPILER.replace("1.0", "2.0"))
    second = build.build_cached(isa.ISAS[-1])
    assert second.parent != first.parent
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 16)
    assert build.build_cached(isa.ISAS[-1]).name != second.name


def test_prebuilt_libraries_come_first_and_old_ones_go(
    fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build.PREBUILT_DIR
    folder.mkdir()
    (folder / "psa_portable_old.so").write_text("old")
    built = build.build_all(folder)
    assert [path.name for path in built] == [build.library_name(i) for i in isa.buildable()]
    assert set(folder.iterdir()) == set(built)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert build.build_cached(isa.ISAS[-1]) == folder / build.library_name(isa.ISAS[-1])


def test_compiler_errors_are_shown(fake_compiler: Path) -> None:
    fake_compiler.write_text("#!/bin/sh\necho 'unknown flag' >&2; exit 1\n")
    with pytest.raises(build.BuildError, match="unknown flag"):
        build.build_cached(isa.ISAS[-1])


def test_without_compiler_the_reason_says_what_to_install(fresh: Path) -> None:
    script = """
        from sgl_psa_kernels._native import build, load, native_available
        import pathlib
        build.PREBUILT_DIR = pathlib.Path("/nonexistent")
        ok, reason = native_available()
        assert not ok
        assert "apt-get install g++" in reason, reason
        try:
            load()
        except RuntimeError as error:
            assert str(error) == reason
        else:
            raise AssertionError("load did not raise")
    """
    done = python(script, PATH="/nonexistent", CXX="", SGL_PSA_CACHE_DIR=str(fresh))
    assert done.returncode == 0, done.stderr


def test_a_forced_instruction_set_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.ISA_VARIABLE, "sse9")
    with pytest.raises(RuntimeError, match=r"'sse9'.*avx512vnni, avx512, avx2, portable"):
        loader.choose_isa()
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setenv(loader.ISA_VARIABLE, "avx512")
    with pytest.raises(RuntimeError, match=r"this CPU lacks it.*avx2, portable"):
        loader.choose_isa()
    monkeypatch.setenv(loader.ISA_VARIABLE, "portable")
    assert loader.choose_isa().name == "portable"
    monkeypatch.delenv(loader.ISA_VARIABLE)
    assert loader.choose_isa().name == "avx2"


def test_the_variable_reaches_the_loaded_library() -> None:
    script = """
        from sgl_psa_kernels._native import load, native_available
        assert native_available() == (True, "portable")
        assert load().psa_isa() == b"portable"
    """
    done = python(script, SGL_PSA_CPU_ISA="portable")
    assert done.returncode == 0, done.stderr


def test_one_openmp_runtime_in_the_process() -> None:
    script = """
        import pathlib, re, torch
        from sgl_psa_kernels._native import native_available
        before = torch.ones(100000).exp().sum()
        assert native_available()[0]
        maps = pathlib.Path("/proc/self/maps").read_text()
        found = set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)[^/\\s]*\\.so\\S*", maps))
        assert len(found) == 1, found
    """
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_argument_structs_match_the_library() -> None:
    library = loader.load()
    sizes = [library.psa_struct_size(i) for i in range(len(abi.FUNCTIONS))]
    assert len(set(sizes)) > 1
    assert library.psa_struct_size(len(abi.FUNCTIONS)) == -1
    assert library.psa_abi_version() == abi.ABI_VERSION


def test_the_compiler_keeps_prefetches(tmp_path: Path) -> None:
    """GCC takes functions that do nothing but prefetch for ones without effect."""
    source, output = build.SOURCE_DIR / "sketch_score.cpp", tmp_path / "sketch_score.s"
    flags = [*build.COMMON_FLAGS, *isa.ISAS[-1].compiler_flags]
    command = [*build.compiler(), *flags, "-S", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    assert re.search(r"\b(prefetch|prfm)", output.read_text())
