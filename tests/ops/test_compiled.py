"""What the kernels become on GPUs that are not here: matrix units used, shared memory that the card has, registers that suffice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SHARED = {80: 163, 89: 99, 90: 227, 120: 99}  # KiB of shared memory that a program may take
HALVES = [("attend", "latent"), ("score", "select", "align", "codec")]  # about as much work

# Of kernels in the form "sm_90 32/2 128 attend forward union": heads/key heads, channels, call, kernel.
WITHOUT_PRODUCTS = (
    r"(unite|prepare|combine|last_reads|(sampled|threshold|part_candidates|choose|choose_parts)_kernel"
    r"|_quantise|_dequantise|_hadamard|_rotate|_index_keys)$|top_k"
)
FLOAT32 = r"index_scores_backward"  # exact products: matrix units have none
FEW_ROWS = r" (?!128/1)\S+ \d+ attend.*( rows$|decode)| 16/16 .* union$| 128/1 .*_backward"  # a warp group multiplies 64 rows at least
SCORES = r" (forward|sample|candidates|exhaustive)_kernel$"  # a token has the same bits in each of them

# The kernels that may spill, how many bytes at most, and why; all others may not. The release of Triton stands before the name.
SPILLS = [
    (r"sm_90 .* attend(_dense)? forward( union|_dense)", 320, "128 registers, so that two programs share a processor: measured 20 % faster"),
    (r"attend_backward, deterministic backward union", 192, "adds 64-bit integers"),
    (r" 128/1 576 attend", 896, "a query's rows of 576 channels and what they sum fill the registers"),
    (r"sm_90 (128|16)/1 656 attend", 1088, "64 rows with Triton 3.9 (8 bytes with 3.6); bfloat16 queries take the Gluon kernel"),
    (r"sm_80 32/[28] 128 attend_backward backward union", 192, "128 rows, twice as wide as the registers hold with sm_80's instructions"),
    (r"sm_120 16/16 128 attend_dense forward_dense", 128, "128 rows in 4 warps"),
    (r"sm_(80|120) .* align (sparse sparse|dense dense)", 96, "the sums over keys of 16 queries fill the registers"),
    (r"sm_90 64x128 bf16 ", 304, "with Triton 3.9 (none with 3.6): two programs share a processor: measured 35 % faster"),
    (r"sm_90 9/3 64 4x64 align dense dense", 128, "with Triton 3.9 (none with 3.6): two programs share a processor"),
    (r"sm_80 16/1 656 attend", 96, "keys as they are unpacked fill the registers beside 16 rows of 576 channels"),
    (r" (32/8|16/16) 128 attend", 64, "addresses in 64 bits beside what fills the registers"),
    (
        r"select of \d+ choose_kernel",
        1824,
        "80 registers, outside the loops with Triton 3.6: with fewer warps and 128 registers measured 1.4 % slower",
    ),
    (r"top_k of 2048, \d+ rows top_k_kernel", 3456, "80 registers; with Triton 3.6, which was measured, a third as many bytes, outside the loops"),
    (r" of 2048, .* (choose_parts|part_candidates)_kernel", 128, "a thousand threads, of one program or of two, have 64 registers each"),
    (r"select of 2048 with scores choose_kernel", 2560, "80 registers, half as many bytes with Triton 3.6: K2 was measured with them, not without"),
    (r"select of 8192 with scores choose_kernel", 1088, "holds the candidates of a row in registers"),
    (r"exhaustive_kernel", 64, "runs for rows only whose sample was of no use"),
    (FLOAT32, 8192, "for tests and drawings; nothing trains through it"),
    # A release whose assembler spills more of what is above; nothing was measured with it.
    (r"^3\.7 .* select of 2048 choose_kernel", 3136, "80 registers"),
    (r"^3\.7 .* select of 8192 with scores choose_kernel", 1280, "holds the candidates of a row in registers"),
    (r"^3\.7 .* top_k of 2048, \d+ rows top_k_kernel", 7424, "80 registers"),
]


def most(name: str, spills: list[tuple[str, int, str]]) -> int:
    """Bytes that a kernel of this name may spill, in the form of `SPILLS`."""
    release = ".".join(triton.__version__.split(".")[:2])
    return max((number for pattern, number, _ in spills if re.search(pattern, f"{release} {name}")), default=0)


def found(capability: int, operators: tuple[str, ...], cache: Path) -> list[dict]:
    """Every kernel of these operators, compiled in a process in which kernels are not interpreted."""
    program = Path(__file__).with_name("compilations.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # nothing is read from it: all is compiled
    run = subprocess.run([sys.executable, program, str(capability), *operators], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("operators", HALVES, ids="-".join)
@pytest.mark.parametrize("capability", SHARED, ids="sm_{}".format)
def test_compiled_kernels(capability: int, operators: tuple[str, ...], tmp_path: Path) -> None:
    kernels = {f"sm_{capability} {row['call']} {row['kernel']}": row for row in found(capability, operators, tmp_path)}
    assert len(kernels) > 15
    problems = []
    for name, row in kernels.items():
        wants = None if re.search(f"{WITHOUT_PRODUCTS}|{FLOAT32}", name) else "wgmma" if capability == 90 and not re.search(FEW_ROWS, name) else "mma"
        if wants and wants not in (row["matrix_unit"] or ""):
            problems.append(f"{name}: instructions of the matrix units are {row['matrix_unit']}, not {wants}")
        there = 48 if row["kernel"] == "unite" else SHARED[capability]  # KB; memory of its own is not asked for at a launch
        if row["shared"] > there << 10:
            problems.append(f"{name}: takes {row['shared']} bytes of shared memory, there are {there << 10}")
        allowed = most(name, SPILLS)
        if row["spilled"] > allowed:
            problems.append(f"{name}: spills {row['spilled']} bytes with {row['registers']} registers, {allowed} are allowed")
        if re.search(SCORES, name) and row["sums_of_products"]:
            problems.append(f"{name}: leaves open which of two products is rounded, {row['sums_of_products']} times")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_threads_that_share_a_sum_have_the_same_bits_of_it(tmp_path: Path) -> None:
    fused = {row["kernel"]: row["fused_sums"] for row in found(90, ("align_float32",), tmp_path)}
    assert fused.keys() >= {"dense", "sparse", "key_gradients"} and not any(fused.values()), fused


@pytest.mark.parametrize("pattern", [WITHOUT_PRODUCTS, FLOAT32, FEW_ROWS, SCORES, *(pattern for pattern, *_ in SPILLS)])
def test_patterns_are_those_of_names(pattern: str) -> None:
    re.compile(pattern)
