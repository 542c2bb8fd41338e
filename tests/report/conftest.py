"""What the report's tests share: a text that was read, and Debian's browser."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless chromium. Nothing is downloaded: without one the tests are skipped with a word, in CI they fail."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        need = "needs chromium: apt install chromium"
        pytest.fail(need) if os.environ.get("CI") else pytest.skip(need)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to sandbox root
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()
