"""The examples run from beginning to end, all but the retrofit as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "01_dsa_in_100_lines.py": "skim.select and skim.attend give the same.",
    "02_retrofit_your_model.py": "the base has no gradient",
    "03_use_the_operators.py": "7. MLA",
    "04_watch_it_read.py": "['ch']",
}
SHORTER = {"02_retrofit_your_model.py": ["--steps", "3", "--length", "64", "--budget", "16"]}


def test_every_numbered_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("0*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    caches = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, EXAMPLES / name, *SHORTER.get(name, [])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=caches, timeout=600)
    assert run.returncode == 0, run.stderr
    assert SAYS[name] in run.stdout


def test_a_hundred_lines_are_a_hundred() -> None:
    assert len((EXAMPLES / "01_dsa_in_100_lines.py").read_text(encoding="utf-8").splitlines()) <= 100
