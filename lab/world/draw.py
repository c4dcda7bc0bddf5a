"""Drawing: flat cartoons from signed distances, vectorised over frames.

Lengths are in 1/64 of the picture's side, whatever its size in pixels. Distances are negative
inside; a pixel's coverage is one half on the outline and falls over one pixel, which is the whole
antialiasing. Letters: f frames, h rows, w columns. Colours are RGB 0..255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .scene import Scene
from .timing import eye_opening, head_bob, since_hit, speech_at

Field = NDArray[np.float32]
Number = float | Field
Colour = tuple[float, float, float]

RGB: dict[str, Colour] = {
    "red": (214, 38, 42),
    "orange": (244, 132, 26),
    "yellow": (246, 216, 48),
    "green": (44, 160, 68),
    "blue": (44, 96, 216),
    "purple": (142, 60, 182),
    "white": (243, 243, 243),
    "black": (26, 26, 32),
}
SKIN_RGB: dict[str, Colour] = {
    "pale": (252, 222, 200),
    "tan": (222, 170, 122),
    "brown": (132, 84, 54),
}
MOUTH_RGB: Colour = (92, 8, 20)
DARK: Colour = (30, 26, 30)
WOOD: Colour = (134, 90, 48)
MOUTH_HEIGHT = 12.0  # of a wide-open mouth
FLOOR = 55.0


class Canvas:
    """f pictures, painted in place, plane by plane: (f, 3, h, w) float32."""

    def __init__(self, frames: int, size: int, background: Colour) -> None:
        self.scale = size / 64.0
        self.size = size
        self.planes = np.empty((frames, 3, size, size), dtype=np.float32)
        self.planes[:] = np.array(background, dtype=np.float32)[:, None, None]

    def box(self, left: float, top: float, right: float, bottom: float) -> Patch:
        """The part of the canvas that a shape stays in; painting touches only these pixels."""
        edges = [int(np.floor(v * self.scale)) for v in (left, top)]
        ends = [int(np.ceil(v * self.scale)) for v in (right, bottom)]
        x0, y0 = (max(v, 0) for v in edges)
        x1, y1 = (min(v, self.size) for v in ends)
        return Patch(self, slice(x0, x1), slice(y0, y1))

    def pixels(self) -> NDArray[np.uint8]:
        """(f, h, w, 3) uint8."""
        rounded = (self.planes + np.float32(0.5)).astype(np.uint8)
        return np.ascontiguousarray(rounded.transpose(0, 2, 3, 1))


class Patch:
    """A rectangle of a canvas with its coordinates: x (1, 1, w) and y (1, h, 1)."""

    def __init__(self, canvas: Canvas, columns: slice, rows: slice) -> None:
        self.view = canvas.planes[:, :, rows, columns]
        self.scale = np.float32(canvas.scale)
        pixel = np.arange(canvas.size, dtype=np.float32)
        self.x = ((pixel[columns] + 0.5) / self.scale)[None, None, :]
        self.y = ((pixel[rows] + 0.5) / self.scale)[None, :, None]

    def paint(self, distance: Field, colour: Colour, opacity: Number = 1.0) -> None:
        """Lay a colour where `distance` (f or 1, h, w) is negative; opacity may be (f, 1, 1)."""
        cover = np.clip(np.float32(0.5) - distance * self.scale, 0.0, 1.0)
        if not (isinstance(opacity, float) and opacity == 1.0):
            cover = cover * opacity
        for channel, value in enumerate(colour):
            plane = self.view[:, channel]
            plane += cover * (np.float32(value) - plane)


def per_frame(values: NDArray[np.float64]) -> Field:
    """(f) -> (f, 1, 1), ready to meet a patch's coordinates."""
    return values.astype(np.float32)[:, None, None]


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (factor < 1) or lighter (> 1, towards white) colour."""
    if factor <= 1:
        return tuple(c * factor for c in colour)  # type: ignore[return-value]
    return tuple(255 - (255 - c) * (2 - factor) for c in colour)  # type: ignore[return-value]


def ellipse(x: Field, y: Field, rx: Number, ry: Number) -> Field:
    """Distance to an ellipse about the origin, accurate near its outline."""
    ax, ay = x / rx, y / ry
    q = ax * ax + ay * ay
    gx, gy = ax / rx, ay / ry
    return (q - np.float32(1.0)) / (2 * np.sqrt(gx * gx + gy * gy) + np.float32(1e-6))


def circle(x: Field, y: Field, radius: float) -> Field:
    """Distance to a circle about the origin."""
    return np.sqrt(x * x + y * y) - np.float32(radius)


def rounded_box(x: Field, y: Field, half_w: Number, half_h: Number, radius: float = 0.0) -> Field:
    """Distance to a box about the origin with rounded corners."""
    qx, qy = np.abs(x) - half_w + radius, np.abs(y) - half_h + radius
    outside = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
    return outside + np.minimum(np.maximum(qx, qy), 0) - np.float32(radius)


def rotated(x: Field, y: Field, angle: Field) -> tuple[Field, Field]:
    """Coordinates in a frame turned by `angle` (radians, clockwise on the screen)."""
    c, s = np.cos(angle), np.sin(angle)
    return x * c + y * s, y * c - x * s


def draw(scene: Scene, t: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Draw the scene at each time: (f) -> (f, size, size, 3) uint8."""
    canvas = Canvas(len(t), size, RGB[scene.attributes["background"]])
    {"speech": _face, "ball": _ball, "bell": _bell, "drum": _drum}[scene.kind](scene, t, canvas)
    return canvas.pixels()


def _floor(scene: Scene, canvas: Canvas) -> None:
    """A floor of the background's colour, a little darker (lighter on black), under a line."""
    background = RGB[scene.attributes["background"]]
    dark = scene.attributes["background"] == "black"
    floor = canvas.box(0, FLOOR - 1, 64, 64)
    below = floor.y - np.float32(FLOOR) + 0 * floor.x
    floor.paint(-below, shade(background, 1.15 if dark else 0.8))
    floor.paint(np.abs(below) - 0.6, shade(background, 1.45 if dark else 0.45))


# ------------------------------------------------------------------------------------------ face


def _face(scene: Scene, t: NDArray[np.float64], canvas: Canvas) -> None:
    look = scene.attributes
    skin, hair, shirt = SKIN_RGB[look["skin"]], RGB[look["hair"]], RGB[look["shirt"]]
    right, down = (per_frame(v) for v in head_bob(scene, t))
    cx = np.float32(32 + scene.place) + right
    cy = np.float32(28.0) + down

    mane = canvas.box(8, 4, 56, 56 if scene.long_hair else 38)
    x, y = mane.x - cx, mane.y - cy
    mane.paint(ellipse(x, y + 4.0, 18.5, 18.5), hair)
    if scene.long_hair:
        mane.paint(rounded_box(x, y - 9.0, 18.0, 16.0, 6.0), hair)

    body = canvas.box(0, 40, 64, 64)
    x, y = body.x - np.float32(32 + scene.place), body.y
    body.paint(ellipse(x, y - 68.0, 27.0, 17.0), shirt)
    body.paint(ellipse(x, y - 51.5, 7.5, 4.0), shade(skin, 0.85))
    body.paint(rounded_box(x, y - 47.0, 5.0, 6.0, 2.0), shade(skin, 0.85))

    head = canvas.box(13, 6, 51, 50)
    x, y = head.x - cx, head.y - cy
    head.paint(ellipse(x, y - 1.0, 15.5, 18.5), skin)
    fringe = np.maximum(ellipse(x, y + 3.0, 16.5, 17.5), ellipse(x, y + 19.0, 22.0, 11.0))
    head.paint(fringe, hair)

    _eyes(scene, t, canvas, skin, cx, cy)
    nose = canvas.box(26, 26, 38, 36)
    nose.paint(ellipse(nose.x - cx, nose.y - cy - 4.2, 1.5, 1.1), shade(skin, 0.82))
    _mouth(scene, t, canvas, skin, cx, cy)


def _eyes(
    scene: Scene, t: NDArray[np.float64], canvas: Canvas, skin: Colour, cx: Field, cy: Field
) -> None:
    """Eyes that blink, and cheeks."""
    lid = per_frame(eye_opening(scene, t))
    height = np.maximum(3.7 * lid, np.float32(0.45))
    for side in (-6.8, 6.8):
        left = 32 + scene.place + side
        eye = canvas.box(left - 6, 19, left + 6, 32)
        x, y = eye.x - cx - np.float32(side), eye.y - cy + np.float32(1.6)
        white = ellipse(x, y, 3.4, height)
        eye.paint(white - 0.5, shade(skin, 0.5))
        eye.paint(white, (252, 252, 252), lid)
        eye.paint(np.maximum(ellipse(x, y - 0.4, 2.3, 2.6), white), DARK, lid)
        eye.paint(circle(x + 0.8, y + 0.5, 0.8), (252, 252, 252), lid)
    for side in (-10.0, 10.0):
        left = 32 + scene.place + side
        cheek = canvas.box(left - 5, 28, left + 5, 42)
        x, y = cheek.x - cx - np.float32(side), cheek.y - cy - np.float32(6.5)
        cheek.paint(ellipse(x, y, 2.6, 1.9), (232, 88, 88), 0.3)


def _mouth(
    scene: Scene, t: NDArray[np.float64], canvas: Canvas, skin: Colour, cx: Field, cy: Field
) -> None:
    """Dark red inside an ellipse as wide as the vowel asks and as tall as the voice is loud."""
    speech = speech_at(scene, t)
    half_w = per_frame(speech.width / 2)
    half_h = per_frame(speech.mouth * (MOUTH_HEIGHT / 2))
    patch = canvas.box(32 + scene.place - 12, 28, 32 + scene.place + 12, 49)
    x, y = patch.x - cx, patch.y - cy - np.float32(10.8)
    thin = np.float32(0.5) / patch.scale
    patch.paint(ellipse(x, y, half_w + 0.9, half_h + 0.9), _lips(skin))
    # A slit thinner than a pixel is drawn one pixel thick and as much fainter.
    inside = ellipse(x, y, half_w, np.maximum(half_h, thin))
    patch.paint(inside, MOUTH_RGB, np.minimum(half_h / thin, np.float32(1.0)))


def _lips(skin: Colour) -> Colour:
    return skin[0] * 0.8, skin[1] * 0.52, skin[2] * 0.52


# ------------------------------------------------------------------------------------- hit things


def _ball(scene: Scene, t: NDArray[np.float64], canvas: Canvas) -> None:
    """A ball on a parabola between hits, squashed while it touches the floor."""
    period = 1.0 / scene.rate
    tau = since_hit(scene, t)
    u = tau / period
    rise = 36.0 * min(1.0, period) ** 0.7
    lift = rise * 4.0 * u * (1.0 - u)
    near = np.minimum(tau, period - tau)
    squash = 0.28 * np.exp(-((near / 0.045) ** 2))
    radius = 9.0
    colour = RGB[scene.attributes["ball"]]
    _floor(scene, canvas)
    rx, ry = per_frame(radius * (1 + 0.7 * squash)), per_frame(radius * (1 - squash))
    cy = np.float32(FLOOR) - per_frame(lift) - ry
    cx = 32.0 + scene.place

    ground = canvas.box(cx - 14, FLOOR - 3, cx + 14, FLOOR + 6)
    shadow = per_frame(1.0 - 0.55 * lift / 36.0)
    spot = ellipse(ground.x - cx, ground.y - FLOOR - 1.2, 10.5 * shadow, 2.2 * shadow)
    ground.paint(spot, (0, 0, 0), 0.35 * shadow)
    patch = canvas.box(cx - 14, 0, cx + 14, FLOOR + 2)
    x, y = patch.x - np.float32(cx), patch.y - cy
    outline = ellipse(x, y, rx, ry)
    black = scene.attributes["ball"] == "black"
    patch.paint(outline, shade(colour, 1.3 if black else 0.62))
    patch.paint(outline + 1.1, colour)
    patch.paint(circle(x + 3.0, y + 3.2, 1.9), shade(colour, 1.5 if black else 1.65))


def _bell(scene: Scene, t: NDArray[np.float64], canvas: Canvas) -> None:
    """A bell on a yoke; it swings from hit to hit and its clapper meets the rim at each."""
    side = -1.0 if scene.mirrored else 1.0
    cycles = (t - scene.offset) * scene.rate
    whole = np.floor(cycles)
    sign = side * np.where(np.mod(whole, 2) == 0, 1.0, -1.0)
    u = cycles - whole
    swing = per_frame(np.deg2rad(28.0) * sign * np.cos(np.pi * u))
    # Leaves one rim at a hit and meets the other at the next: a kink marks the instant.
    clapper = per_frame(np.deg2rad(17.0) * sign * (1.0 - 2.0 * u))
    px, py = 32.0 + scene.place, 11.0
    colour = RGB[scene.attributes["bell"]]
    black = scene.attributes["bell"] == "black"

    patch = canvas.box(px - 29, 6, px + 29, 60)
    x, y = rotated(patch.x - np.float32(px), patch.y - np.float32(py), -swing)
    tongue = rotated(x, y, -clapper)
    patch.paint(circle(tongue[0], tongue[1] - 34.0, 3.6), WOOD)
    patch.paint(circle(tongue[0], tongue[1] - 34.0, 2.6), shade(WOOD, 1.4))
    patch.paint(rounded_box(x, y - 2.0, 2.2, 5.0, 1.0), WOOD)
    v = np.clip((y - 5.0) / 27.0, 0.0, 1.0)
    half = 8.0 * np.sqrt(np.clip(v * 4.0, 0.0, 1.0)) + 1.5 + 7.5 * v**3
    body = np.maximum(np.maximum((np.abs(x) - half) * 0.9, 5.0 - y), y - 32.0)
    edge = shade(colour, 1.3 if black else 0.62)
    patch.paint(body, edge)
    patch.paint(body + 1.1, colour)
    patch.paint(np.maximum(body + 1.1, np.abs(y - 27.5) - 0.7), edge)
    patch.paint(rounded_box(x + 4.0, y - 16.0, 1.2, 5.5, 1.2), shade(colour, 1.5 if black else 1.6))

    yoke = canvas.box(0, 0, 64, 16)
    yoke.paint(rounded_box(yoke.x - px, yoke.y - 8.0, 17.0, 3.2, 1.5), WOOD)
    yoke.paint(rounded_box(yoke.x - px, yoke.y - 3.0, 3.0, 4.0, 0.5), shade(WOOD, 0.75))
    yoke.paint(circle(yoke.x - px, yoke.y - 8.0, 1.6), shade(WOOD, 0.5))


def _drum(scene: Scene, t: NDArray[np.float64], canvas: Canvas) -> None:
    """A drum whose skin gives a little under a stick that swings up and comes back for the hit."""
    period = 1.0 / scene.rate
    tau = since_hit(scene, t)
    u = tau / period
    raised = per_frame(np.deg2rad(46.0) * min(1.0, 0.55 + 0.45 * period) * np.sin(np.pi * u))
    dip = per_frame(1.6 * np.exp(-tau / 0.05))
    cx, top = 32.0 + scene.place, 33.0
    colour = RGB[scene.attributes["drum"]]
    black = scene.attributes["drum"] == "black"
    edge = shade(colour, 1.3 if black else 0.62)

    ground = canvas.box(cx - 25, 54, cx + 25, 64)
    ground.paint(ellipse(ground.x - cx, ground.y - 58.5, 22.0, 3.4), (0, 0, 0), 0.3)
    patch = canvas.box(cx - 22, top - 8, cx + 22, 63)
    x, y = patch.x - np.float32(cx), patch.y
    body = np.minimum(rounded_box(x, y - 43.0, 18.0, 10.0), ellipse(x, y - 53.0, 18.0, 5.5))
    patch.paint(body, edge)
    patch.paint(body + 1.1, colour)
    for hoop in (38.5, 52.5):
        band = np.abs(ellipse(x, y - hoop, 18.0, 5.5)) - 0.9
        patch.paint(np.maximum(np.maximum(band, hoop - y), body), edge)
    skin = ellipse(x, y - top, 18.0, 6.0)
    patch.paint(skin, WOOD)
    patch.paint(ellipse(x, y - top - 0.4 * dip, 16.2, 4.6 - 0.5 * dip), (250, 232, 196))

    _stick(scene, canvas, cx, top, raised, dip)


def _stick(scene: Scene, canvas: Canvas, cx: float, top: float, raised: Field, dip: Field) -> None:
    side = -1.0 if scene.mirrored else 1.0
    patch = canvas.box(0, 0, 64, top + 8)
    # The hand is at (26, -10) from the skin's middle; the tip meets the skin at a hit.
    x = (patch.x - np.float32(cx)) * np.float32(side) - 26.0
    y = patch.y - np.float32(top - 10.0)
    rest = np.float32(np.arctan2(9.0, 26.0))
    x, y = rotated(x, y, raised - rest)
    length = np.float32(np.hypot(9.0, 26.0))
    shaft = rounded_box(x + length / 2 - 2.0, y, length / 2 + 1.0, 1.5, 1.4)
    patch.paint(shaft - 0.5, shade(WOOD, 0.45))
    patch.paint(shaft + 0.3, shade(WOOD, 1.35))
    tip = circle(x + length, y, 2.6)
    patch.paint(tip, shade(WOOD, 0.45))
    patch.paint(tip + 0.8, shade(WOOD, 1.35))
