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


LAUNCHED = "launched: attend.kernels.forward select.kernels.choose_kernel\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at choose_kernel+0x2c0 in kernels.py:340
=========     and Read access at choose_kernel+0x3c0 in kernels.py:342 [16 hazards]
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


HANDED = """launched: attend.hopper.forward attend.union.unite
========= Error: Race reported between Read access at forward+0x16f0 in hopper.py:441
=========     and Write access at forward+0x80e0 in hopper.py:400 [2048 hazards]
=========
"""


@pytest.mark.parametrize(
    ("output", "code", "verdict", "errors", "explained", "others"),
    [
        (LAUNCHED + "========= ERROR SUMMARY: 0 errors\n", 0, "clean", {}, {}, {}),
        (LAUNCHED + RACE + READ + READ, 1, "NOT CLEAN", {"choose_kernel": 1, "forward": 2}, {}, {}),
        (LAUNCHED + TORCH, 1, "clean", {}, {}, {"at::native::vectorized_elementwise_kernel": 1}),
        (LAUNCHED + "========= Program hit an error that names no kernel\n", 1, "NOT CLEAN", {"": 1}, {}, {}),
        (LAUNCHED + "========= something new\n", 1, "NOT CLEAN", {}, {}, {}),
        ("Traceback (most recent call last):\n", 0, "NOT CLEAN", {}, {}, {}),
        (HANDED, 1, "explained", {}, {"forward": 1}, {}),
        (HANDED + RACE.replace("choose_kernel", "unite"), 1, "NOT CLEAN", {"unite": 1}, {"forward": 1}, {}),
        (HANDED.replace("unite", "unite attend.kernels.forward"), 1, "NOT CLEAN", {"forward": 1}, {}, {}),  # which of them, it doesn't say
    ],
)
def test_what_racecheck_says(output, code, verdict, errors, explained, others):
    found = sanitize.summary("racecheck", output, code)
    assert (found["verdict"], found["errors"], found["explained"], found["of_others"]) == (verdict, errors, explained, others)
    assert bool(found["output"]) == (verdict == "NOT CLEAN")


def test_what_is_explained_of_one_tool_is_an_error_of_another():
    found = sanitize.summary("memcheck", HANDED, 1)
    assert (found["verdict"], found["errors"]) == ("NOT CLEAN", {"forward": 1})


def test_only_findings_in_kernels_that_there_are_get_explained():
    assert {name for _, name in sanitize.KNOWN} <= kernels()


def test_tools_that_run_at_the_same_time():
    said = {("memcheck", "one"): LAUNCHED, ("racecheck", "one"): LAUNCHED, ("racecheck", "two"): LAUNCHED + RACE, ("racecheck", "three"): HANDED}
    found = sanitize.check({place: [sys.executable, "-c", f"print({text!r})"] for place, text in said.items()}, dict(os.environ))
    assert {tool: result["verdict"] for tool, result in found.items()} == {"memcheck": "clean", "racecheck": "NOT CLEAN"}
    assert (found["racecheck"]["errors"], found["racecheck"]["explained"]) == ({"choose_kernel": 1}, {"forward": 1})
    assert {case: of["verdict"] for case, of in found["racecheck"]["cases"].items()} == {"one": "clean", "two": "NOT CLEAN", "three": "explained"}
