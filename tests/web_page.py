"""Run in ComfyUI's own Python: a workflow opened in its page, run by the Run button, and a picture.

python web_page.py URL WORKFLOW.json PICTURE.png

Nodes that the page offers to replace are replaced first, by its own button. Prints this pack's
templates in the page's order and what it found, or fails. Needs playwright and a Chromium
(CHROMIUM, or one on the PATH).
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path

from chromium_page import opened, show
from playwright.sync_api import Page

URL, WORKFLOW, PICTURE = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
BROKEN = "() => window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type)"
TEMPLATES = """async () =>
    (await window.comfyAPI.api.api.getWorkflowTemplates())["ComfyUI-MutualForcing"]"""
FIT = '() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView")'


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
    with opened(URL, alone=True) as page:
        listed = page.evaluate(TEMPLATES)
        sys.stdout.write(f"templates: {', '.join(listed)}\n")
        show(page, WORKFLOW)
        sys.stdout.write(f"replaced: {', '.join(replaced(page)) or 'none'}\n")
        sys.stdout.write(f"missing: {', '.join(page.evaluate(BROKEN)) or 'none'}\n")
        entry = run(page)
        sys.stdout.write(f"status: {entry['status']['status_str']}\n")
        page.evaluate(FIT)
        page.wait_for_timeout(2500)
        page.screenshot(path=PICTURE)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(entry["status"]["messages"]))


main()
