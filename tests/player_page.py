"""Run in ComfyUI's own Python: the player in its page, by the keyboard alone.

python player_page.py URL WORKFLOW.json FOLDER SECONDS [STREAM LINE ...]

Opens a workflow, runs it once for the model to be there, then for SECONDS. Where there are lines,
types each of them a while after it has heard the one before, then presses Stop; the stream is saved
as STREAM. Keeps pictures of the page in FOLDER and prints the page's own numbers as JSON, times in
seconds after Run was pressed. Needs playwright and a Chromium (CHROMIUM, or one on the PATH).
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

from chromium_page import opened, show
from playwright.sync_api import Page

URL, WORKFLOW, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
SECONDS, STREAM, LINES = int(sys.argv[4]), (sys.argv[5:6] or [""])[0], sys.argv[6:]
BETWEEN = 4000  # milliseconds that a line is listened to before the next one is typed
RENDERER = os.environ.get("MF_RENDERER", "canvas")
SET = """(values) => {
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in values) widget.value = values[widget.name];
}"""
# Typed lines are read by the CLIP of the loader.
CONNECT = """() => {
    const [loader] = window.app.graph.nodes.filter((node) => node.type === "MF_LoadModel");
    for (const node of window.app.graph.nodes) {
        const slot = node.type === "MF_GenerateClip" ? node.findInputSlot("clip") : -1;
        if (slot >= 0) loader.connect(1, node, slot);
    }
}"""
SAVE = """(name) => {
    const [sampler] = window.app.graph.nodes.filter((node) => node.type === "MF_GenerateClip");
    const saver = window.LiteGraph.createNode("MF_SaveState");
    saver.pos = [sampler.pos[0], sampler.pos[1] + sampler.size[1] + 420];
    window.app.graph.add(saver);
    saver.widgets.find((widget) => widget.name === "name").value = name;
    sampler.connect(sampler.findOutputSlot("state"), saver, saver.findInputSlot("state"));
}"""
# The players of the page's nodes; the one whose run began last is looked at.
STATE = """() => {
    const players = window.app.graph.nodes
        .flatMap((node) => node.widgets ?? [])
        .map((widget) => widget.player)
        .filter((player) => player?.status);
    const player = players.sort((a, b) => a.numbers.begun - b.numbers.begun).at(-1);
    if (!player) return null;
    const { video, numbers, status } = player;
    const { ahead, ...rest } = numbers;
    return {
        players: players.length, status,
        done: players.every((each) => each.status.over && each.video.ended),
        turns: players.map(({ numbers }) => numbers.firstSound).sort(), numbers: rest,
        least: Math.min(...(ahead ?? []).map(([, left]) => left)),
        facts: player.facts.textContent, said: player.said.textContent,
        time: video.currentTime, duration: video.duration, ended: video.ended,
        error: video.error?.message ?? null, hidden: video.hidden, muted: video.muted,
        focus: document.activeElement?.getAttribute("aria-label")
            ?? document.activeElement?.textContent?.trim().slice(0, 40),
    };
}"""


def until(page: Page, wanted: str, seconds: float) -> dict:
    """The player's state once a JavaScript condition on it (`s`) holds."""
    end = time.monotonic() + seconds
    state = None
    while time.monotonic() < end:
        state = page.evaluate(STATE)
        if state and page.evaluate(f"(s) => Boolean({wanted})", state):
            return state
        page.wait_for_timeout(100)
    raise SystemExit(f"never came: {wanted}; last: {json.dumps(state)}")


def press_run(page: Page, previous: str | None) -> tuple[float, str]:
    """Queue by the keyboard; when that was, and the run's id."""
    pressed = page.evaluate("() => performance.now()")
    page.keyboard.press("Control+Enter")
    state = until(page, f"s.status.prompt_id !== {json.dumps(previous)}", 120)
    return pressed, state["status"]["prompt_id"]


def done(page: Page, seconds: float) -> dict:
    """The state when nothing is queued any more and every player has come to its end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{URL}/queue") as answer:
            queue = json.load(answer)
        if not queue["queue_running"] and not queue["queue_pending"]:
            return until(page, "s.done", seconds)
        page.wait_for_timeout(200)
    raise SystemExit("never done")


def focus(page: Page, label: str) -> None:
    """Walk to a control with the Tab key, from the player's video on."""
    page.evaluate("() => document.querySelector('.mf-player video').focus()")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate(STATE)["focus"] == label:
            return
    raise SystemExit(f"the Tab key does not lead to {label!r}")


def main() -> None:
    """See above."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with opened(URL) as page:
        setting = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
        page.evaluate(setting, RENDERER == "vue")
        page.wait_for_timeout(500)
        show(page, WORKFLOW)
        page.evaluate(CONNECT)
        if STREAM:
            page.evaluate(SAVE, STREAM)
        page.evaluate(SET, {"seconds": 2, "variation": 1})
        _, first = press_run(page, None)
        done(page, 600)
        page.evaluate(SET, {"seconds": SECONDS, "variation": 2})
        pressed, _ = press_run(page, first)
        found = until(page, "s.numbers.firstSound", 600)
        page.wait_for_timeout(1000)
        page.screenshot(path=str(FOLDER / "playing.png"))
        for count, line in enumerate(LINES, start=1):
            focus(page, "What happens next")
            page.keyboard.type(line)
            page.keyboard.press("Enter")
            until(page, f"s.numbers.lines.length === {count}", 60)
            found = until(page, f"s.numbers.lines[{count - 1}].heard || s.status.over", 600)
            page.wait_for_timeout(BETWEEN)
            # Drawing the whole page takes the cores for a while.
            page.screenshot(path=str(FOLDER / f"line{count}.png"))
        if LINES:
            focus(page, "Stop")
            page.keyboard.press("Space")
        found = done(page, max(600, 60 * SECONDS))
        page.screenshot(path=str(FOLDER / "over.png"))
        numbers = found["numbers"]
        after = {name: (numbers[name] - pressed) / 1000 for name in ("firstPicture", "firstSound")}
        lines = [
            line | {"answered": (line["heard"] - line["sent"]) / 1000}
            for line in numbers["lines"]
            if "heard" in line
        ]
        found |= {"after": after, "renderer": RENDERER, "lines": lines}
        sys.stdout.write(json.dumps(found) + "\n")


main()
