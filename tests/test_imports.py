"""Who may import whom, read from the source; and that importing Skim needs none of its extras."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skim.ops.dispatch import IMPLEMENTATIONS

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted(SOURCE.rglob("*.py"))
EXTRAS = ("transformers", "triton", "numba", "accelerate", "gguf", "huggingface_hub", "tokenizers", "datasets", "peft", "matplotlib", "jinja2")

# A room and the rooms that it may import, itself aside. The root package holds the public names, so it stands on top.
BOTTOM = {"config", "selection"}
MODELS = {"ops", "modules", "huggingface", "parallel"} | BOTTOM
USES = {"training", "evaluation", "report", "bench"}
MAY_IMPORT = {
    "config": set(),
    "selection": set(),
    "ops": {"selection"},
    "modules": {"ops"} | BOTTOM,
    "compat": {"ops"} | BOTTOM,
    "huggingface": {"modules", "ops"} | BOTTOM,
    "parallel": {"modules", "ops"} | BOTTOM,
    **{use: MODELS for use in USES},
    "report": MODELS | {"evaluation"},  # it draws what was evaluated
    "<root>": MODELS | USES,
    "cli": MODELS | USES | {"<root>"},
    "__main__": {"cli"},
}
KERNELS = {"reference", "triton", "hopper", *IMPLEMENTATIONS}


def imports(source: str, package: str) -> Iterator[str]:
    """Every module (or name in a module) that `source` imports, absolute, wherever in the file; `package` holds the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            start = next(ast.walk(node.args[0])) if node.args else None
            if isinstance(start, ast.JoinedStr) and start.values:  # f"skim.ops.{operator}": as far as it is known
                start = start.values[0]
            if isinstance(start, ast.Constant) and isinstance(start.value, str):
                yield start.value


def room(module: str) -> str:
    """The room of DESIGN's house that a module of skim is in; the names of the root package are in "<root>"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "<root>"


def kernel(module: str) -> tuple[str, str] | None:
    """(operator, implementation) of a module that belongs to an implementation."""
    parts = module.split(".")
    return (parts[2], parts[3]) if parts[:2] == ["skim", "ops"] and len(parts) > 3 and parts[3] in KERNELS else None


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (below src/) imports and may not."""
    parts = Path(path).with_suffix("").parts
    package = ".".join(parts[:-1])
    module = package if parts[-1] == "__init__" else ".".join(parts)
    if module != "skim" and room(module) == "<root>":
        return [f"{path} is in no room of the house: give it one here, or put it into one"]
    found = []
    for target in imports(source, package):
        if target.split(".")[0] != "skim":
            continue
        if room(target) not in MAY_IMPORT[room(module)] | {room(module)}:
            found.append(f"{path}: {room(module)} imports {target}")
        mine, other = kernel(module), kernel(target)
        if mine and other and mine != other and mine[1] != other[1] and (mine[0] == other[0] or mine[1] == "reference"):
            found.append(f"{path}: the implementation {mine[1]} imports the implementation {target}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file: Path) -> None:
    assert violations(str(file.relative_to(SOURCE)), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("skim/config.py", "from skim.selection import Selection"),
        ("skim/selection.py", "import skim.ops"),
        ("skim/ops/checks.py", "from skim.config import Config"),
        ("skim/ops/checks.py", "from ..modules import LightningIndexer"),
        ("skim/ops/attend/__init__.py", "from ... import modules"),
        ("skim/ops/attend/__init__.py", "from skim import convert"),
        ("skim/modules/indexer.py", "def late():\n    from skim.huggingface import convert"),
        ("skim/modules/indexer.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import skim.training"),
        ("skim/huggingface/convert.py", "from skim.evaluation import perplexity"),
        ("skim/huggingface/convert.py", "import skim"),
        ("skim/huggingface/convert.py", "from skim.parallel import context"),
        ("skim/evaluation/table.py", "from skim.cli import main"),
        ("skim/evaluation/table.py", "from importlib import import_module\nimport_module(f'skim.report.{1}')"),
        ("skim/__init__.py", "from skim.cli import main"),
        ("skim/ops/attend/triton.py", "from skim.ops.attend import reference"),
        ("skim/ops/attend/triton.py", "from .reference import attend"),
        ("skim/ops/attend/hopper.py", "import skim.ops.attend.triton"),
        ("skim/ops/align/reference.py", "from skim.ops.attend.triton import attend"),
        ("skim/helpers.py", "import os"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("skim/ops/attend/triton.py", "import triton\nfrom triton import language"),
        ("skim/ops/attend/__init__.py", "from skim.selection import Selection\nfrom skim.ops.checks import expect_tensor"),
        ("skim/ops/align/reference.py", "from skim.ops.attend.reference import dense_keys"),
        ("skim/ops/align/triton.py", "from ..attend import triton"),
        ("skim/modules/indexer.py", "from skim.ops import select\nfrom skim.config import Config"),
        ("skim/huggingface/__init__.py", "from .convert import convert\nimport transformers"),
        ("skim/training/loop.py", "from skim.huggingface import convert"),
        ("skim/cli.py", "import skim\nfrom skim.bench import run"),
        ("skim/__init__.py", "from skim.config import Config\nfrom skim import ops"),
    ],
)
def test_a_right_import_is_none_of_its_business(path: str, source: str) -> None:
    assert violations(path, source) == []


def python_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where every import of an extra fails and no GPU is seen."""
    block = f"import sys\nfor name in {EXTRAS}:\n    sys.modules[name] = None\n"
    bare = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, env=bare, timeout=300)


def test_extras_are_really_blocked() -> None:
    assert "import of transformers halted" in python_without_extras("import transformers").stderr


def test_skim_works_without_its_extras() -> None:
    code = """
import torch, skim
q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8)
selection = skim.select(q, k[:, :, 0], torch.randn(1, 5, 2), 3)
out, lse = skim.attend(q, k, k, selection)
assert out.isfinite().all() and skim.Config(budget=3).budget == 3
print(skim.__version__)
"""
    run = python_without_extras(code)
    assert run.returncode == 0, run.stderr


def test_the_command_works_without_extras() -> None:
    run = python_without_extras("import sys\nfrom skim.cli import main\nsys.argv = ['skim', 'doctor']\nsys.exit(main())")
    assert run.returncode == 0, run.stderr
