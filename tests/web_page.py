"""Run in ComfyUI's own Python: a workflow opened in its page, run by the Run button, and a picture.

python web_page.py URL WORKFLOW.json PICTURE.png

Nodes that the page offers to replace are replaced first, by its own button. Prints what it found,
or fails. Needs playwright and a Chromium (CHROMIUM, or one on the PATH).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from playwright.sync_api import Page, Route, sync_playwright

URL, WORKFLOW, PICTURE = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
READY = (
    "() => window.app?.extensionManager && window.app?.graph && window.app?.vueAppReady !== false"
)
OPEN = """([text, name]) =>
    window.app.handleFile(new File([text], name, { type: "application/json" }))"""
BROKEN = "() => window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type)"
FIT = '() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView")'


def only_here(route: Route) -> None:
    """Let the page reach its own server and nothing else."""
    here = urlparse(route.request.url).hostname == urlparse(URL).hostname
    route.continue_() if here else route.abort()


def replaced(page: Page) -> list[str]:
    """The node types that the page says are gone, after pressing its button that replaces them."""
    gone = page.evaluate(BROKEN)
    if gone:
        page.get_by_role("button", name="View details").first.click()
        page.get_by_role("button", name=re.compile("Replace (All|Node)")).first.click()
        page.wait_for_timeout(1500)
    return gone


def run(page: Page) -> dict:
    """Press Run; the history entry of what it queued."""
    with page.expect_response(
        lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
    ) as answered:
        page.locator('[data-testid="queue-button"]').first.click()
    answer = answered.value.json()
    if "prompt_id" not in answer:
        raise SystemExit(f"refused: {answer}")
    for _ in range(1200):
        page.wait_for_timeout(500)
        with urllib.request.urlopen(f"{URL}/history/{answer['prompt_id']}") as history:
            entry = json.load(history).get(answer["prompt_id"])
        if entry:
            return entry
    raise SystemExit("not finished in ten minutes")


def main() -> None:
    """Open, replace, run, and take a picture."""
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            viewport={"width": 1600, "height": 1000},
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context.set_default_timeout(300_000)  # a machine may be busy with other work
        context.route("**/*", only_here)
        page = context.pages[0]
        page.goto(URL, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.wait_for_timeout(4000)
        page.keyboard.press("Escape")  # the templates dialog that greets a first visit
        page.wait_for_timeout(500)
        page.evaluate(OPEN, [WORKFLOW.read_text(encoding="utf-8"), WORKFLOW.name])
        page.wait_for_timeout(2000)
        sys.stdout.write(f"replaced: {', '.join(replaced(page)) or 'none'}\n")
        sys.stdout.write(f"missing: {', '.join(page.evaluate(BROKEN)) or 'none'}\n")
        entry = run(page)
        sys.stdout.write(f"status: {entry['status']['status_str']}\n")
        page.evaluate(FIT)
        page.wait_for_timeout(2500)
        page.screenshot(path=PICTURE)
        context.close()
    if entry["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(entry["status"]["messages"]))


main()
