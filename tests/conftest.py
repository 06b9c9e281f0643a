"""Shared fixtures. Without a GPU every Triton kernel runs in the interpreter, which must be chosen before import."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what several rooms' tests share: looks.py

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("FLEXREC_VALUE_CHECKS", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernel tests run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped by name where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, which is Debian's or the user's own; CI sets FLEXREC_REQUIRE_BROWSER, and has one."""
    if os.environ.get("FLEXREC_REQUIRE_BROWSER"):
        pass
    else:
        pytest.importorskip("playwright.sync_api", reason="the extra 'test'")
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None and not os.environ.get("FLEXREC_REQUIRE_BROWSER"):
        pytest.skip("no Chromium on PATH")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
