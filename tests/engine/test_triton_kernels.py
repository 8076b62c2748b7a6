"""The Triton kernels of the chunked losses: their cases in a process of their own, and what a compiler says.

Triton decides when it is imported whether kernels are interpreted, its own functions included, and PEFT imports it. So
the interpreter needs a process of its own, and no other test can meet it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from promptkd.engine.cuda import triton_kernels

CASES = Path(__file__).parents[1] / "helpers" / "triton_kernel_cases.py"
SECONDS = 600


@pytest.mark.slow
def test_every_case():
    """On the GPU where there is one, else on the CPU by Triton's interpreter."""
    interpret = "0" if torch.cuda.is_available() else "1"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)],
        cwd=CASES.parents[2],
        env=os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


PROGRAMS = {
    "reverse_kl": (triton_kernels._reverse_kl_rows, {}),
    "reverse_kl_to_one": (triton_kernels._reverse_kl_rows, {"plain": None}),
    "forward_kl": (triton_kernels._forward_kl_rows, {}),
    "cross_entropy": (triton_kernels._cross_entropy_rows, {}),
}
TYPES = {"weight": "fp32", "labels": "*i64"} | dict.fromkeys(
    ("stride", "student_stride", "plain_stride", "target_stride"), "i32"
)


@pytest.fixture(scope="module", params=PROGRAMS)
def compiled(request, tmp_path_factory):
    """What Triton compiles for an H100, which needs no GPU: its own form, PTX and machine code; for aligned rows."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    program, absent = PROGRAMS[request.param]
    constants = absent | {"SIZE": 151_665, "BLOCK": triton_kernels._BLOCK}
    names = program.arg_names
    types = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name] in ("*fp32", "i32")
    }
    source = ASTSource(program, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_kernels._WARPS}
        ).asm


@pytest.mark.slow
def test_offsets_of_rows_have_64_bits(compiled):
    """8,192 rows of 151,936 logits, and several such, are beyond 2^31."""
    widths = re.findall(r"arith\.muli .*: (i\d+)", compiled["ttir"])
    assert widths
    assert set(widths) == {"i64"}


def test_aligned_rows_move_16_bytes_at_a_time(compiled):
    """An odd vocabulary size must not take that away: the mask of its last block would, on every load."""
    assert "ld.global.v4" in compiled["ptx"]
    assert "st.global.v4" in compiled["ptx"]


def test_three_programs_run_per_multiprocessor(compiled, tmp_path):
    """Its 65,536 registers suffice, and none is spilled to memory."""
    (tmp_path / "program.cubin").write_bytes(compiled["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "program.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    assert 3 * int(registers) * 32 * triton_kernels._WARPS <= 65_536
    assert stack == "0"
