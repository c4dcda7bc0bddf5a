"""What the page asks of runs over HTTP: to play a clip that grows, to stop, to take a typed line,
and to wait for it where there is no end.

Everything lies below /mutual_forcing, behind ComfyUI's own checks of who may ask. A file is
found by the run that writes it, never by a path out of the request, and it lies in ComfyUI's
temporary or output folder, so nothing is given that ComfyUI's /view would not give.
"""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from server import PromptServer

from . import streams
from .live import CHARACTERS, LiveRun, run_of, runs

_RUN = "/mutual_forcing/live/{prompt_id}/{node_id}"
_PIECE, _LOOK_AGAIN = 1 << 18, 0.02
_LARGEST_BODY = 6 * CHARACTERS + 100  # a character is up to six bytes of JSON


def register() -> None:
    """Serve the routes; ComfyUI serves them below /api as well."""
    routes = PromptServer.instance.routes
    routes.get("/mutual_forcing/live")(list_runs)
    routes.get("/mutual_forcing/streams")(list_streams)
    routes.get(f"{_RUN}/clip.mp4")(play)
    routes.post(f"{_RUN}/stop")(stop)
    routes.post(f"{_RUN}/line")(take_line)
    routes.post(f"{_RUN}/played")(take_place)


async def list_runs(_request: web.Request) -> web.Response:
    """Every run that is remembered, for a page that was loaded again."""
    return web.json_response([run.status for run in runs()])


async def list_streams(_request: web.Request) -> web.Response:
    """What each saved stream is, for Load Stream."""
    return web.json_response(await asyncio.to_thread(streams.listed))


async def play(request: web.Request) -> web.StreamResponse:
    """A finished clip as a file, with byte ranges; a growing one, or its preview, from its start to
    its end."""
    run = _asked_for(request)
    if run.clip is None:
        raise web.HTTPNotFound(text="this run writes no clip while it samples")
    if run.over:
        if not run.clip.is_file():
            raise web.HTTPNotFound(text="the clip is not there any more")
        return web.FileResponse(run.clip, headers={"Content-Type": "video/mp4"})
    headers = {"Content-Type": "video/mp4", "Cache-Control": "no-store"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    with run.watched():
        await _follow(run, request, response)
    return response


async def stop(request: web.Request) -> web.Response:
    """End the run after the block that is being made, well."""
    run = _asked_for(request)
    await _body(request)
    run.stop()
    return web.json_response(run.status)


async def take_line(request: web.Request) -> web.Response:
    """What happens next: `{"line": "..."}`."""
    run = _asked_for(request)
    body = await _body(request)
    if not isinstance(body, dict) or not isinstance(body.get("line"), str):
        raise web.HTTPBadRequest(text='expected {"line": "what happens next"}')
    try:
        run.type(body["line"])
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    return web.json_response(run.status)


async def take_place(request: web.Request) -> web.Response:
    """Which second of the clip is played: `{"second": 1.5}`."""
    run = _asked_for(request)
    body = await _body(request)
    second = body.get("second") if isinstance(body, dict) else None
    if not isinstance(second, int | float) or not 0 <= second < math.inf:
        raise web.HTTPBadRequest(text='expected {"second": a number}')
    run.plays_at(float(second))
    return web.json_response({})


def _asked_for(request: web.Request) -> LiveRun:
    run = run_of(request.match_info["prompt_id"], request.match_info["node_id"])
    if run is None:
        raise web.HTTPNotFound(text="there is no such run: press Run for another one")
    return run


async def _body(request: web.Request) -> object:
    # A form of another site's cannot send this type unasked.
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="expected application/json")
    try:
        body = await request.content.readexactly(_LARGEST_BODY + 1)
    except asyncio.IncompleteReadError as error:
        body = error.partial
    if len(body) > _LARGEST_BODY:
        raise web.HTTPRequestEntityTooLarge(_LARGEST_BODY, len(body))
    try:
        return json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text="expected JSON") from error


async def _follow(run: LiveRun, request: web.Request, response: web.StreamResponse) -> None:
    """Pass on what is in a clip and what is added to it, until the run is over or nobody listens.

    The file is not kept open: a cancelled run's clip is moved, which some systems refuse then.
    """
    sent = 0
    while request.transport is not None and not request.transport.is_closing():
        over = run.over  # before reading: what was written before it is read now
        piece = b""
        if run.begun or over:
            with suppress(OSError):  # on its way from one folder to another
                piece = await asyncio.to_thread(_read, run.preview or run.clip, sent)
        if piece:
            sent += len(piece)
            await response.write(piece)
        elif over:
            return
        else:
            await asyncio.sleep(_LOOK_AGAIN)


def _read(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_PIECE)
