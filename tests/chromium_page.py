"""ComfyUI's page in a Chromium of its own, for the scripts that run in ComfyUI's own Python.

Needs playwright and a Chromium (CHROMIUM, or one on the PATH).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from playwright.sync_api import Page, Route, sync_playwright

READY = (
    "() => window.app?.extensionManager && window.app?.graph && window.app?.vueAppReady !== false"
)
OPEN = """([text, name]) =>
    window.app.handleFile(new File([text], name, { type: "application/json" }))"""


@contextmanager
def opened(url: str, *, alone: bool = False) -> Iterator[Page]:
    """The page at `url` once it is ready; `alone`: it reaches its own server and nothing else."""
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )

    def only_here(route: Route) -> None:
        here = urlparse(route.request.url).hostname == urlparse(url).hostname
        route.continue_() if here else route.abort()

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            viewport={"width": 1600, "height": 1000},
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context.set_default_timeout(300_000)  # a machine may be busy with other work
        if alone:
            context.route("**/*", only_here)
        page = context.pages[0]
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.wait_for_timeout(4000)
        page.keyboard.press("Escape")  # the templates dialog that greets a first visit
        page.wait_for_timeout(500)
        yield page
        context.close()


def show(page: Page, workflow: Path) -> None:
    """Open a workflow's file."""
    page.evaluate(OPEN, [workflow.read_text(encoding="utf-8"), workflow.name])
    page.wait_for_timeout(2000)
