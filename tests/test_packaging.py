"""The wheel: all of Skim's files are in it, and it works where nothing else of the repository is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRAP = ("__pycache__", ".pyc", ".pyo")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No network: the build backend comes with the extra `dev`.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/skim").rglob("*") if path.is_file()}
    files = {name for name in files if not any(scrap in name for scrap in SCRAP)}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert files <= packed, f"not in the wheel: {sorted(files - packed)}"
    assert "skim/py.typed" in packed


@pytest.mark.parametrize("folder", ["texts", "indexers"])
def test_the_demo_needs_no_download(wheel: Path, folder: str) -> None:
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    assets = {name: size for name, size in sizes.items() if name.startswith(f"skim/assets/{folder}/")}
    assert any(size > 10_000 for size in assets.values()), assets
    assert any(name.endswith("README.md") for name in assets), f"no word on where they come from: {assets}"


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = importlib.metadata.version("skim-attention")
    assert top == {"skim", f"skim_attention-{version}.dist-info"}


def test_the_licence_and_the_notice_travel_along(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if "/licenses/" in name}
    assert "Apache License" in texts["LICENSE"]
    assert "SmolLM2" in texts["NOTICE"]


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import skim; from importlib.resources import files; assert (files('skim') / 'assets/texts').is_dir(); print(skim.__file__)"
    paths = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=paths, timeout=300)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path)


def test_one_version_everywhere() -> None:
    import skim

    assert skim.__version__ == importlib.metadata.version("skim-attention")
    assert f"\nversion: {skim.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_command_is_there() -> None:
    (command,) = (entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == "skim")
    assert callable(command.load())
