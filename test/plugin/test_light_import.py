"""SGLang imports the entry points in every process: they must cost nothing by themselves."""

import subprocess
import sys

import pytest

PROBE = """
import sys
import {module}
heavy = [m for m in ("torch", "sglang", "transformers", "numpy") if m in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("module", ["plugin", "platform", "compat", "hooks", "state", "run"])
def test_entry_modules_import_neither_torch_nor_sglang(module):
    probe = PROBE.format(module=f"sglang_psa.{module}")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_runner_without_a_module_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "sglang_psa.run"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "usage: python -m sglang_psa.run MODULE" in done.stderr
