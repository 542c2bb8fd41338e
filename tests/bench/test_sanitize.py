"""The program that launches every kernel for compute-sanitizer: it runs, it forgets none, and it reads what the tools say."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "benchmarks" / "sanitize.py"
if not FILE.exists():
    pytest.skip("benchmarks are in the repository only", allow_module_level=True)
spec = importlib.util.spec_from_file_location("sanitize", FILE)
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


def kernels() -> set[str]:
    """The names of all functions of Triton that Skim launches: `name[grid](...)`."""
    found = set()
    for file in [*(ROOT / "src/skim/ops").glob("*/*.py"), ROOT / "src/skim/bench/gather.py"]:
        tree = ast.parse(file.read_text())
        jitted = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "jit" in ast.unparse(node.decorator_list)}
        module = ".".join(file.relative_to(ROOT / "src/skim").with_suffix("").parts).removeprefix("ops.")
        origin = {name.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                name = node.func.value.id
                if name in jitted:
                    found.add(f"{module}.{name}")
                elif name in origin:
                    found.add(f"{origin[name].removeprefix('skim.ops.')}.{name}")
    return found


def test_every_kernel_is_launched():
    run = subprocess.run(
        [sys.executable, FILE, "--run"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    launched = set(run.stdout.rpartition(sanitize.MARK)[2].split())
    assert launched == {name for name in kernels() if "hopper" not in name}  # which no interpreter runs
    assert len(launched) > 20


LAUNCHED = "launched: attend.kernels.forward select.triton.choose_kernel\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at choose_kernel+0x2c0 in triton.py:340
=========     and Read access at choose_kernel+0x3c0 in triton.py:342 [16 hazards]
=========
"""
READ = """========= Invalid __global__ read of size 4 bytes
=========     at forward+0x1a0 in kernels.py:212
=========     by thread (0,0,0) in block (0,0,0)
"""
TORCH = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::Fill<float>>(int, T1)+0x70
=========     by thread (3,0,0) in block (0,0,0)
"""


@pytest.mark.parametrize(
    ("output", "code", "clean", "errors", "others"),
    [
        (LAUNCHED + "========= ERROR SUMMARY: 0 errors\n", 0, True, {}, {}),
        (LAUNCHED + RACE + READ + READ, 1, False, {"choose_kernel": 1, "forward": 2}, {}),
        (LAUNCHED + TORCH, 1, True, {}, {"at::native::vectorized_elementwise_kernel": 1}),
        (LAUNCHED + "========= Program hit an error that names no kernel\n", 1, False, {"": 1}, {}),
        (LAUNCHED + "========= something new\n", 1, False, {}, {}),
        ("Traceback (most recent call last):\n", 0, False, {}, {}),
    ],
)
def test_what_the_tools_say(output, code, clean, errors, others):
    found = sanitize.summary(output, code)
    assert (found["clean"], found["errors"], found["of_others"]) == (clean, errors, others)
    assert bool(found["output"]) == (not clean)


def test_tools_that_run_at_the_same_time():
    said = {("memcheck", "one"): LAUNCHED, ("racecheck", "one"): LAUNCHED, ("racecheck", "two"): LAUNCHED + RACE}
    found = sanitize.check({place: [sys.executable, "-c", f"print({text!r})"] for place, text in said.items()}, dict(os.environ))
    assert found["memcheck"]["clean"] and not found["racecheck"]["clean"] and found["racecheck"]["errors"] == {"choose_kernel": 1}
    assert found["racecheck"]["cases"]["one"]["clean"] and list(found["racecheck"]["cases"]) == ["one", "two"]
