"""The manual: its code runs and prints what it says, its commands exist, its figures are those of the committed results."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from skim.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>[\w-]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?P<command>skim .*)$", re.MULTILINE)
MOST_BYTES = 300_000  # of a picture


class Block(NamedTuple):
    """A fenced block of a page; `line` is that of its first line of code."""

    kind: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    return [Block(found["kind"], found["code"], text.count("\n", 0, found.start("code")) + 1) for found in FENCE.finditer(text)]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def run(page: str, text: str) -> Iterator[tuple[str, str]]:
    """Runs a page's Python blocks one after the other in one namespace: what each printed, and what the page says of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(text)
    for block, following in zip(found, [*found[1:], Block("", "", 0)]):
        if block.kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)  # so that a traceback names the page's line
            if following.kind == "output":
                yield printed.getvalue(), following.code


def commands(text: str) -> list[str]:
    """Every `skim ...` in a block for a shell or an indented one; a line that ends in a backslash goes on."""
    shell = "\n".join(block.code for block in blocks(text) if block.kind in ("bash", "sh", "console"))
    lines = [line.strip() for line in shell.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("skim ")] + [found["command"] for found in INDENTED.finditer(text)]


def exit_code(command: str) -> int:
    """Of the command with --help behind it, which names a wrong command or option and does nothing else."""
    return CliRunner().invoke(app, [*shlex.split(command, comments=True)[1:], "--help"]).exit_code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_and_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for printed, said in run(str(page), read(page)):
        assert printed == said


def test_a_block_that_prints_something_else_is_found() -> None:
    page = "```python\nx = 1\n```\n\nand\n\n```python\nprint(x + 1)\n```\n\n```output\n3\n```\n"
    assert list(run("page", page)) == [("2\n", "3\n")]
    with pytest.raises(NameError):
        list(run("page", "```python\nnowhere\n```\n"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    for command in commands(read(page)):
        assert exit_code(command) == 0, command


@pytest.mark.parametrize("command", ["skim shwo x", "skim eval smollm2-135m --budgets 3", "skim train cold x"])
def test_a_wrong_command_is_found(command: str) -> None:
    assert exit_code(command) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(page)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")  # as if the script were run
        spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_results(figures: ModuleType) -> None:
    for page in PAGES:
        assert figures.filled(read(page)) == read(page), f"{page.name} differs from benchmarks/results: run python docs/figures.py"


def test_a_figure_that_was_changed_by_hand_is_found(figures: ModuleType) -> None:
    page = read(ROOT / "docs/performance.md")
    assert figures.filled(page.replace("NVIDIA H200", "NVIDIA H300")) == page


def test_a_target_of_several_figures_is_told_with_its_intervals(figures: ModuleType) -> None:
    beyond = {"percent": 0.25, "low": 0.1, "high": 0.4}
    told = {"percent": 0.123, "low": None, "high": None, "beyond_twice_budget": beyond}
    name = "512, with its interval and beyond 2 x budget"
    several = {"value": {"512": 0.123, "256": None, "128": 4.5, name: told}}
    assert figures.measured(several) == f"128: 4.5; {name}: +0.12 %, beyond +0.25 % (+0.10 to +0.40)"
    assert figures.measured({"value": {"percent": -12.3, "low": -20.0, "high": -1.0}}) == "-12 % (-20 to -1.00)"
    assert figures.number(1.5e-5) == "1.5e-05" and figures.number(123456) == "123,456"


def test_plots_are_drawn_from_the_committed_results(figures: ModuleType) -> None:
    assert json.loads(figures.DRAWN_FROM.read_text()) == figures.plotted(), "run python docs/figures.py"
    assert all((figures.PLOTS / name).is_file() for name in figures.plotted())
    assert {path.name for path in figures.PLOTS.glob("*.svg")} <= figures.plotted().keys()  # none of a result that is gone


def test_plots_can_be_drawn(figures: ModuleType, tmp_path: Path) -> None:
    for name in figures.plotted():
        figures.draw(name, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0


def test_every_result_has_its_command_and_is_named_on_the_page(figures: ModuleType) -> None:
    page = read(ROOT / "docs/performance.md")
    for name, result in figures.results().items():
        assert result["command"] and f"`{name}.json`" in page


def test_measured_figures_stand_only_in_tables_made_from_results(figures: ModuleType) -> None:
    for name in ("README.md", "docs/performance.md", "docs/economics.md", "docs/claims.md", "docs/faq.md", "docs/how-dsa-works.md"):
        prose = figures.MARK.sub("", read(ROOT / name))
        assert re.findall(r"\d[\d.,]* ?(?:ms|TFLOPS|TB/s|GiB|MiB|nats|times as fast)\b", prose) == []


def test_pictures_are_light() -> None:
    for picture in (ROOT / "docs/img").iterdir():
        assert picture.stat().st_size < MOST_BYTES, picture.name


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "softmax" in (tmp_path / "operators.html").read_text(encoding="utf-8")  # of the docstrings
    assert "<math" in (tmp_path / "how-dsa-works.html").read_text(encoding="utf-8")
