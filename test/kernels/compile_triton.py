"""Compiles the Triton kernels for a CUDA device that need not be there: run by test_triton.py.

    python test/kernels/compile_triton.py [compute capability, 90]

Prints each kernel with its shared memory, registers and stack, and fails where a kernel does not
compile, needs more than a multiprocessor of that capability has, or spills more than a few
registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import sgl_psa_kernels.progressive_decode.triton_backend as decode_backend
import test_key_sketch
import test_page_summary
import test_rotated_sketch
import test_tail_compensation
import torch
from kernel_cases import BF16, Case, make_batch
from sgl_psa_kernels import triton_support
from sgl_psa_kernels.candidate_pages import candidate_pages
from sgl_psa_kernels.merge_state import merge_state
from sgl_psa_kernels.page_tier import HostStore, TierShape, TritonTier
from sgl_psa_kernels.page_tier.triton_state import LIST, MISSED
from sgl_psa_kernels.progressive_decode import flashinfer_rows
from sgl_psa_kernels.progressive_decode.flashinfer_rows import Rows, RowShape
from sgl_psa_kernels.tail_compensation import compensate
from sgl_psa_kernels.watermark import advance
from test_progressive_decode import RULES, decode
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}[CAPABILITY]
#: Bytes a thread may keep in memory for want of registers, where there are 255.
STACK_BYTES = 160
#: Pages of a long context, for which blocks of pages are as large as they get.
LONG = 8192
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from what ptxas left in the kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def compile_only(self, *args, grid, warmup, **options):
    """In place of a launch."""
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    shared = kernel.metadata.shared
    registers, stack = registers_and_stack(kernel.asm["cubin"])
    name = f"{self.fn.__module__}.{self.fn.__name__}"
    print(f"{name}: {shared} bytes shared, {registers} registers, {stack} bytes of stack")
    assert shared <= SHARED_BYTES and stack <= STACK_BYTES, name
    return kernel


def main() -> None:
    case = Case(BF16, 128, 16, 2, 4, (600,))
    batch = make_batch(case)
    log_mass = torch.zeros(1, 8, batch.page_table.shape[1])
    first = torch.ones(1, 2, dtype=torch.int32)
    told = {"kappa_start": torch.zeros(1, 8), "residuals": torch.zeros(1, 8, 3)}
    for options in ({"first_pages": first}, told, {"group_pages": 16, **told}):
        decode(batch, log_mass, RULES["coverage-.8"], "triton", **options)
    table, batch.page_table = batch.page_table, torch.zeros(1, LONG, dtype=torch.int32)
    for options in ({}, {"first_pages": first}, told):
        options = {"group_percent": 100, **options}
        decode(batch, torch.zeros(1, 8, LONG), RULES["coverage-.8"], "triton", **options)
    batch.page_table = table
    decode(batch, None, RULES["dense"], "triton")
    flashinfer_rows.planned = unattended
    decode(batch, log_mass, RULES["coverage-.8"], "flashinfer", group_pages=16, **told)
    for module in (test_key_sketch, test_rotated_sketch):
        module.score(batch, *module.make_sketch(batch, 2, "triton"), 2, "triton")
    for bits in test_page_summary.BITS:
        for kind in ("hybrid", "box"):
            stored = test_page_summary.make_summary(batch, "triton", kind, bits)
            test_page_summary.score(batch, stored, "triton", kind)
    active = torch.ones(1, dtype=torch.uint8)
    options = {"num_kv_heads": 2, "page_size": 16, "count": 8, "backend": "triton"}
    candidate_pages(log_mass, batch.seq_lens, active, **options)
    advance(torch.zeros(9, dtype=torch.int32), torch.arange(40), page_size=16, backend="triton")
    compensate(**test_tail_compensation.arguments(batch), backend="triton")
    lse = torch.zeros(8)
    merge_state(torch.zeros(8, 128), lse, torch.zeros(8, 128), lse, backend="triton")

    for host_dtype in (None, torch.int8):
        tier(TierShape(1, 60, 16, 16, 2, 128, BF16, host_dtype))
    filled(TierShape(1, 9, 4, 128, 2, 80, BF16, torch.int8))


def unattended(shape: RowShape) -> Rows:
    """A plan that attends nothing."""
    results = torch.zeros(shape.rows, shape.group, shape.head_dim), torch.zeros(shape.rows, 4)
    indices = torch.zeros(shape.rows * shape.pages, dtype=torch.int32)
    wrapper = SimpleNamespace(run=lambda *_, **__: results)
    return Rows(wrapper, indices, indices[: shape.rows].clone(), 0)


def filled(shape: TierShape) -> TritonTier:
    """A page tier that was written to, read and released."""
    made = TritonTier(shape, HostStore.memory(shape.host_bytes), True)
    rows = torch.zeros(40, 2, shape.head_dim, dtype=BF16)
    for _ in range(2):
        made.write(0, torch.arange(16, 56), rows, rows)
        made.release(torch.arange(4))
    made.gather(0, torch.arange(3), 40, rows, rows.clone())
    return made


def tier(shape: TierShape) -> None:
    """A page tier with a page to bring; launches do nothing, so it is told that one was missed."""
    made = filled(shape)
    log_mass = torch.zeros(1, 8, 50)
    table, lens = torch.arange(50)[None].int(), torch.tensor([600], dtype=torch.int32)
    for mass, group, step in ((None, 4, 1), (log_mass, 4, 2), (log_mass, 16, 3)):
        rule = torch.full((1,), int(mass is not None), dtype=torch.int32)
        made.state.numbers[MISSED : LIST + 1] = torch.tensor([1, 2])
        made.decode(
            0, step, torch.zeros(1, 8, 128, dtype=BF16), table, lens, mass, rule,
            *torch.zeros(3, 1), sm_scale=1.0, sink_pages=1, recent_pages=1, group_pages=group,
        )  # fmt: skip
    assert made.counters().loads == 1


launch = JITFunction.run
JITFunction.run = compile_only
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
    )
)
triton_support.triton_available = lambda device: (True, "")
decode_backend.multiprocessors = lambda device: 132
main()
