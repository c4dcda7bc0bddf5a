"""The whole model once more, from the papers' equations alone, in numpy and float64: a witness from
outside.

n tokens, c channels, a heads, d head dim. One clip, no batch, nothing shared with the pack but the
weights. LTX-2's block is written after the technical report (arXiv 2601.03233) and the layout of
its public weights; blocks, masks, sink tokens and the rolling cache after OmniForcing (arXiv
2603.11647, equations 2 to 5 and 8, sections 3.2 to 3.4); the step size d beside the noise level
after Shortcut Models (arXiv 2410.12557), as docs/mutual_forcing.md has it. Every token carries its
own noise level, its own place and its own row of a mask, so that nothing is spread, grouped, cached
or cut as the pack does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
KeysValues = tuple[Array, Array]


@dataclass(frozen=True)
class Tokens:
    """A run of tokens of one modality; every field has one row per token.

    Attributes:
        x: latents (n, c).
        sigma, step: noise level and step size d.
        place: seconds, and for video the pixel row and column, (n, 3 or 1).
        sink: whether it is one of the learned sink tokens, whose x is not looked at.
    """

    x: Array
    sigma: Array
    step: Array
    place: Array
    sink: Array

    def __add__(self, other: Tokens) -> Tokens:
        fields = ("x", "sigma", "step", "place", "sink")
        return Tokens(*(np.concatenate((getattr(self, f), getattr(other, f))) for f in fields))


@dataclass(frozen=True)
class Geometry:
    """What of a checkpoint's config the equations need; strides and rates are LTX-2's."""

    heads: int
    audio_heads: int
    video_first: int
    audio_first: int
    sinks: int
    height: int
    width: int
    max_time: float = 20.0
    max_pixels: float = 2048.0
    gate_scale: float = 1.0

    def video_latents(self, block: int) -> range:
        """Equation 2: the first block, then three a second."""
        start = 0 if block == 0 else self.video_first + 3 * (block - 1)
        return range(start, start + (self.video_first if block == 0 else 3))

    def audio_latents(self, block: int) -> range:
        """Equation 2: the first block, then 25 a second."""
        start = 0 if block == 0 else self.audio_first + 25 * (block - 1)
        return range(start, start + (self.audio_first if block == 0 else 25))

    def video(self, block: int, latents: Array, sigma: float, step: float = 0.0) -> Tokens:
        """Tokens of a block's latents (c, f, h, w) at the place of block number `block`."""
        places = []
        for latent in self.video_latents(block):
            # Latent 0 is frame 0; latent j is the frames 8j-7 .. 8j, which end at 8j+1.
            begin, end = (0, 1) if latent == 0 else (8 * latent - 7, 8 * latent + 1)
            for row in range(self.height):
                for column in range(self.width):
                    seconds = (begin + end) / 2 / 24
                    places.append((seconds, 32 * row + 16, 32 * column + 16))
        x = latents.transpose(1, 2, 3, 0).reshape(len(places), -1)
        full = np.full(len(places), 1.0)
        return Tokens(x, sigma * full, step * full, np.array(places, float), full == 0)

    def audio(self, block: int, latents: Array, sigma: float, step: float = 0.0) -> Tokens:
        """Tokens of a block's latents (s, c); those of block 0 have the sink tokens before them."""
        places = [(math.nan,)] * self.sinks * (block == 0)
        for latent in self.audio_latents(block):
            # Four frames of 10 ms, the first latent one.
            begin, end = (0, 1) if latent == 0 else (4 * latent - 3, 4 * latent + 1)
            places.append(((begin + end) / 2 * 0.01,))
        sinks = len(places) - len(latents)
        x = np.concatenate((np.zeros((sinks, latents.shape[1])), latents))
        full = np.full(len(places), 1.0)
        return Tokens(x, sigma * full, step * full, np.array(places), np.arange(len(x)) < sinks)


def rms(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sinusoid(times: Array) -> Array:
    """256 features of times (n,): cosines of 128 frequencies from 1 to 1/10000, then sines."""
    angles = np.asarray(times, float)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1)


class NumpyModel:
    """The network over weights under LTX-2's names."""

    def __init__(self, weights: Mapping[str, Array], geometry: Geometry) -> None:
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.geometry = geometry
        self.layers = 1 + max(int(k.split(".")[1]) for k in self.w if k.startswith("transformer_b"))

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def turned(self, x: Array, places: Array, heads: int) -> Array:
        """Rotated queries or keys (n, a, d): each pair of channels is a complex number."""
        n, _, d = x.shape
        axes = places.shape[1]
        limits = np.array([self.geometry.max_time] + [self.geometry.max_pixels] * 2)[:axes]
        count = heads * d // (2 * axes)
        frequencies = math.pi / 2 * 10000.0 ** (np.arange(count) / (count - 1))
        # From -1 at the begin of the trained range to 1 at its end; frequencies outside, axes
        # inside.
        angles = (frequencies[None, :, None] * (2 * places / limits - 1)[:, None, :]).reshape(n, -1)
        angles = np.nan_to_num(angles)  # sink tokens are nowhere: cos 1, sin 0 (equation 8)
        angles = np.pad(angles, ((0, 0), (heads * d // 2 - angles.shape[1], 0)))
        turn = np.exp(1j * angles).reshape(n, heads, d // 2)
        z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate((z.real, z.imag), axis=-1)

    def keys(self, name: str, x: Array, heads: int) -> KeysValues:
        """Keys, not yet rotated, and values (n, a, d)."""
        k = rms(self.linear(f"{name}.to_k", x)) * self.w[f"{name}.k_norm.weight"]
        v = self.linear(f"{name}.to_v", x)
        return k.reshape(len(x), heads, -1), v.reshape(len(x), heads, -1)

    def attention(
        self,
        name: str,
        x: Array,
        heads: int,
        seen: KeysValues,
        places: Array | None = None,
        visible: Array | None = None,
    ) -> Array:
        """Softmax attention from x (n, c) over rotated keys and values."""
        q = rms(self.linear(f"{name}.to_q", x)) * self.w[f"{name}.q_norm.weight"]
        q = q.reshape(len(x), heads, -1)
        if places is not None:
            q = self.turned(q, places, heads)
        scores = np.einsum("nad,mad->anm", q, seen[0]) / math.sqrt(q.shape[-1])
        if visible is not None:
            scores = np.where(visible, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("anm,mad->nad", scores, seen[1]).reshape(len(x), -1)
        return self.linear(f"{name}.to_out.0", out)

    def embedded(self, name: str, times: Array, steps: Array) -> Array:
        def one(embedder: str, t: Array) -> Array:
            hidden = self.linear(f"{name}.emb.{embedder}.linear_1", sinusoid(t))
            return self.linear(f"{name}.emb.{embedder}.linear_2", silu(hidden))

        total = one("timestep_embedder", times)
        if f"{name}.emb.step_size_embedder.linear_1.weight" in self.w:
            total = total + one("step_size_embedder", 1000 * steps)
        return total

    def rows(self, name: str, tokens: Tokens, scale: float = 1000.0) -> Array:
        """(n, k, c) values that a table's k rows are added to."""
        embedded = self.embedded(name, scale * tokens.sigma, tokens.step)
        c = embedded.shape[1]
        return self.linear(f"{name}.linear", silu(embedded)).reshape(len(embedded), -1, c)

    def text(self, context: Array) -> tuple[Array, Array]:
        """Caption embedding (m, c) at both widths."""

        def project(name: str) -> Array:
            return self.linear(f"{name}.linear_2", gelu(self.linear(f"{name}.linear_1", context)))

        return project("caption_projection"), project("audio_caption_projection")

    def run(
        self,
        video: Tokens,
        audio: Tokens,
        context: Array,
        visible: Mapping[str, Array] | None = None,
        past: Sequence[Mapping[str, KeysValues]] = (),
        past_places: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array, list[dict[str, KeysValues]]]:
        """Velocities (n, c) of both modalities, and what each layer keeps for the blocks to come.

        Args:
            visible: (queries, keys) per path; nothing is hidden without it.
            past: per layer and path, keys before rotation and values that stand before the tokens'
                own.
            past_places: of those keys, of video and of audio.
        """
        g = self.geometry
        hv, ha = g.heads, g.audio_heads
        visible = visible or {}
        places_v, places_a = video.place, audio.place
        if past_places is not None:
            places_v = np.concatenate((past_places[0], places_v))
            places_a = np.concatenate((past_places[1], places_a))
        v = self.linear("patchify_proj", video.x)
        a = self.linear("audio_patchify_proj", audio.x)
        if audio.sink.any():
            sinks = self.w["audio_sink_tokens"][0]
            a[audio.sink] = np.tile(sinks, (audio.sink.sum() // len(sinks), 1))
        own_v, own_a = self.rows("adaln_single", video), self.rows("audio_adaln_single", audio)
        cross_v = self.rows("av_ca_video_scale_shift_adaln_single", video)
        cross_a = self.rows("av_ca_audio_scale_shift_adaln_single", audio)
        gate_v = self.rows("av_ca_a2v_gate_adaln_single", video, g.gate_scale)
        gate_a = self.rows("av_ca_v2a_gate_adaln_single", audio, g.gate_scale)
        text_v, text_a = self.text(context)
        kept = []
        for layer in range(self.layers):
            block = f"transformer_blocks.{layer}"
            table_v = self.w[f"{block}.scale_shift_table"] + own_v
            table_a = self.w[f"{block}.audio_scale_shift_table"] + own_a
            meet_v, meet_a = (
                self.w[f"{block}.scale_shift_table_a2v_ca_{name}"]
                + np.concatenate((cross, gate), axis=1)
                for name, cross, gate in (("video", cross_v, gate_v), ("audio", cross_a, gate_a))
            )
            new = {}

            def extended(
                path: str,
                keys: KeysValues,
                places: Array,
                new: dict[str, KeysValues] = new,
                layer: int = layer,
            ) -> KeysValues:
                new[path] = keys
                if past:
                    old = past[layer][path]
                    keys = tuple(np.concatenate(pair) for pair in zip(old, keys, strict=True))
                return self.turned(keys[0], places, keys[0].shape[1]), keys[1]

            for_v = rms(v) * (1 + table_v[:, 1]) + table_v[:, 0]
            for_a = rms(a) * (1 + table_a[:, 1]) + table_a[:, 0]
            seen = extended("video", self.keys(f"{block}.attn1", for_v, hv), places_v)
            v = v + table_v[:, 2] * self.attention(
                f"{block}.attn1", for_v, hv, seen, video.place, visible.get("video")
            )
            seen = extended("audio", self.keys(f"{block}.audio_attn1", for_a, ha), places_a)
            a = a + table_a[:, 2] * self.attention(
                f"{block}.audio_attn1", for_a, ha, seen, audio.place, visible.get("audio")
            )
            words = self.keys(f"{block}.attn2", text_v, hv)
            v = v + self.attention(f"{block}.attn2", rms(v), hv, words)
            words = self.keys(f"{block}.audio_attn2", text_a, ha)
            a = a + self.attention(f"{block}.audio_attn2", rms(a), ha, words)

            # Both look at each other as they were before either was changed. Rows: scale and shift
            # of audio-to-video, scale and shift of video-to-audio, gate of what comes in.
            n_v, n_a = rms(v), rms(a)
            to_video, to_audio = f"{block}.audio_to_video_attn", f"{block}.video_to_audio_attn"
            shown_a = self.keys(to_video, n_a * (1 + meet_a[:, 0]) + meet_a[:, 1], ha)
            shown_v = self.keys(to_audio, n_v * (1 + meet_v[:, 2]) + meet_v[:, 3], ha)
            heard = self.attention(
                to_video,
                n_v * (1 + meet_v[:, 0]) + meet_v[:, 1],
                ha,
                extended("audio_to_video", shown_a, places_a),
                video.place[:, :1],
                visible.get("audio_to_video"),
            )
            watched = self.attention(
                to_audio,
                n_a * (1 + meet_a[:, 2]) + meet_a[:, 3],
                ha,
                extended("video_to_audio", shown_v, places_v[:, :1]),
                audio.place[:, :1],
                visible.get("video_to_audio"),
            )
            v, a = v + meet_v[:, 4] * heard, a + meet_a[:, 4] * watched

            def fed(x: Array, table: Array, name: str) -> Array:
                shift, scale, gate = table[:, 3], table[:, 4], table[:, 5]
                hidden = gelu(self.linear(f"{name}.net.0.proj", rms(x) * (1 + scale) + shift))
                return x + gate * self.linear(f"{name}.net.2", hidden)

            v, a = fed(v, table_v, f"{block}.ff"), fed(a, table_a, f"{block}.audio_ff")
            kept.append(new)

        def head(x: Array, tokens: Tokens, prefix: str) -> Array:
            embedded = self.embedded(f"{prefix}adaln_single", 1000 * tokens.sigma, tokens.step)
            table = self.w[f"{prefix}scale_shift_table"]
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
            x = x * (1 + table[1] + embedded) + table[0] + embedded
            return self.linear(f"{prefix}proj_out", x)

        return head(v, video, ""), head(a, audio, "audio_"), kept


Noise = Callable[[int, int, str, tuple[int, ...]], Array]
"""Block, step, modality and shape to noise."""


def ltx2_schedule(steps: int) -> Array:
    """LTX-2's scheduler at 4096 tokens: a shift of 2.05, stretched to end at 0.1, then 0."""
    t = np.linspace(1, 0, steps + 1)[:-1]
    shifted = math.exp(2.05) / (math.exp(2.05) + 1 / t - 1)
    if steps > 1:
        shifted = 1 - (1 - shifted) * 0.9 / (1 - shifted[-1])
    return np.append(shifted, 0.0)


class Rollout:
    """Block after block: denoised over the kept past, then run clean to be remembered."""

    def __init__(self, model: NumpyModel, window: int) -> None:
        self.model, self.window = model, window
        self.kept: list[list[dict[str, KeysValues]]] = []  # per block, per layer
        self.index = 0

    def pass_over(
        self, video: Array, audio: Array, sigma: float, step: float, context: Array
    ) -> tuple[Array, Array, list[dict[str, KeysValues]]]:
        """Velocities like the latents (c, f, h, w) and (s, c); kept blocks are numbered anew."""
        g, here = self.model.geometry, len(self.kept)
        x_v, x_a = g.video(here, video, sigma, step), g.audio(here, audio, sigma, step)
        past, places = [], None
        if self.kept:
            past = [
                {
                    path: tuple(
                        np.concatenate([block[layer][path][i] for block in self.kept])
                        for i in (0, 1)
                    )
                    for path in self.kept[0][layer]
                }
                for layer in range(self.model.layers)
            ]
            blank_v, blank_a = [], []
            for block in range(here):
                frames = len(g.video_latents(block))
                blank_v.append(g.video(block, np.zeros((1, frames, g.height, g.width)), 0).place)
                blank_a.append(g.audio(block, np.zeros((len(g.audio_latents(block)), 1)), 0).place)
            places = np.concatenate(blank_v), np.concatenate(blank_a)
        out_v, out_a, new = self.model.run(x_v, x_a, context, None, past, places)
        out_v = out_v.reshape(video.shape[1], g.height, g.width, -1).transpose(3, 0, 1, 2)
        return out_v, out_a[~x_a.sink], new

    def remember(self, video: Array, audio: Array, context: Array) -> None:
        """The refresh at sigma 0; block 0 stays, the oldest other block makes room."""
        self.kept.append(self.pass_over(video, audio, 0.0, 0.0, context)[2])
        if len(self.kept) > 1 + self.window:
            del self.kept[1]
        self.index += 1


def generate(
    model: NumpyModel,
    window: int,
    blocks: int,
    sigmas: Sequence[float],
    noise: Noise,
    context: Array,
    *,
    few: bool,
    empty: Array | None = None,
    guidance: float = 1.0,
    renoise: bool = False,
) -> list[tuple[Array, Array]]:
    """A stream's clean latents (c, f, h, w) and (s, c), block by block."""
    g, made = model.geometry, []
    lines = [(Rollout(model, window), context)]
    if empty is not None:
        lines.append((Rollout(model, window), empty))
    channels = (
        model.w["patchify_proj.weight"].shape[1],
        model.w["audio_patchify_proj.weight"].shape[1],
    )
    for block in range(blocks):
        shapes = (
            (channels[0], len(g.video_latents(block)), g.height, g.width),
            (len(g.audio_latents(block)), channels[1]),
        )
        x = [noise(block, 0, name, s) for name, s in zip(("video", "audio"), shapes, strict=True)]
        for step in range(len(sigmas) - 1):
            now, then = sigmas[step], sigmas[step + 1]
            d = now - then if few else 0.0
            found = [line.pass_over(*x, now, d, words)[:2] for line, words in lines]
            v = found[0]
            if empty is not None:
                v = [u + guidance * (c - u) for c, u in zip(*found, strict=True)]
            if renoise:
                x = [value - now * slope for value, slope in zip(x, v, strict=True)]
                if then > 0:
                    x = [
                        (1 - then) * value + then * noise(block, step + 1, name, value.shape)
                        for name, value in zip(("video", "audio"), x, strict=True)
                    ]
            else:
                x = [value + (then - now) * slope for value, slope in zip(x, v, strict=True)]
        made.append(tuple(x))
        for line, words in lines:
            line.remember(*x, words)
    return made


def masked(
    geometry: Geometry, parts: Sequence[tuple[Tokens, Tokens, int, str]]
) -> tuple[Tokens, Tokens, dict[str, Array]]:
    """Parts in a row as one sequence with its four masks: (video, audio, block, kind) each.

    A query sees a "clean" part of an earlier block; a clean query also those of its own block, and
    a query of any other kind its own part.
    """
    video, audio = parts[0][:2]
    for more_v, more_a, _, _ in parts[1:]:
        video, audio = video + more_v, audio + more_a
    who_v = [i for i, part in enumerate(parts) for _ in part[0].sigma]
    who_a = [i for i, part in enumerate(parts) for _ in part[1].sigma]

    def sees(query: int, key: int) -> bool:
        (_, _, q, q_kind), (_, _, k, k_kind) = parts[query], parts[key]
        if k_kind == "clean":
            return k < q or (k == q and q_kind == "clean")
        return query == key

    def mask(queries: list[int], keys: list[int]) -> Array:
        return np.array([[sees(q, k) for k in keys] for q in queries])

    return (
        video,
        audio,
        {
            "video": mask(who_v, who_v),
            "audio": mask(who_a, who_a),
            "audio_to_video": mask(who_v, who_a),
            "video_to_audio": mask(who_a, who_v),
        },
    )
