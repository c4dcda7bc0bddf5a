"""One safetensors file to a ready model: transformer, text encoder and both codecs.

b batch, m text tokens, c channels.
The transformer's keys carry LTX-2's names under `model.diffusion_model.`, as ComfyUI's loaders
expect them; the other parts have prefixes of their own. The sizes of everything are JSON in the
metadata key `config`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..networks.audio_codec import LATENT_FRAMES, AudioCodec, AudioCodecConfig
from ..networks.checked import quoted, reason_of
from ..networks.config import TransformerConfig
from ..networks.picture_track import SIGHT_DTYPE, is_sight
from ..networks.tensor_parallel import Part
from ..networks.text_encoder import TextEncoder, TextEncoderConfig
from ..networks.transcript import TranscriptConfig
from ..networks.transformer import CausalAVTransformer, text_keys
from ..networks.video_codec import SPACE_STRIDE, TIME_STRIDE, VideoCodec, VideoCodecConfig
from ..samplers.clock import Clock
from ..samplers.decode import StreamDecoder
from ..samplers.rollout import Mode, Prompt, new_stream
from ..samplers.schedule import Line, Schedule, is_mark
from ..samplers.speech import Transcript
from ..samplers.state import LARGEST_GRID, MOST_WINDOW, StreamSettings, StreamState
from ..samplers.tensor_file import TensorFileError, read_tensors, write_tensors
from .blank import BlankWeights
from .identity import MODEL_FORMAT as FORMAT
from .identity import PACKED_HEADER, identify
from .keymap import check_shapes, split_layout

TRANSFORMER, TEXT, VIDEO, AUDIO = (
    "model.diffusion_model.",
    "text_encoder.",
    "video_codec.",
    "audio_codec.",
)
STORED = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = (
    "choose the model that ships with this pack (models/mutual_forcing_small.safetensors) or copy "
    "it again"
)


class StreamDefaults(BaseModel):
    """What a stream of this model is unless told otherwise."""

    model_config = ConfigDict(frozen=True)

    window: int = Field(default=3, ge=1, le=MOST_WINDOW)
    height: int = Field(default=2, ge=1, le=LARGEST_GRID)
    width: int = Field(default=2, ge=1, le=LARGEST_GRID)
    fps: int = Field(default=24, ge=1, le=1000)
    sample_rate: int = Field(default=16000, ge=1, le=384000)
    default_mode: Mode = "multi"


class _Header(BaseModel):
    """The metadata key `config`; each part's own class checks what is inside."""

    transformer: dict[str, object]
    text_encoder: dict[str, object]
    video_codec: dict[str, object]
    audio_codec: dict[str, object]
    stream: StreamDefaults = StreamDefaults()
    transcript: dict[str, object] | None = None


class _Packed(BaseModel):
    """What `packed_header` keeps of a file's metadata."""

    title: str
    config: str


@dataclass(frozen=True)
class Bundle:
    """A model, ready to run: a `StreamModel`.

    Attributes:
        transformer: in `dtype` on `device`; the other three are float32, the codecs where they were
            loaded and the text encoder on `device`.
        clock: blocks, latents, frames and samples of its streams.
        stream: sizes and mode of a stream unless told otherwise.
        transcript: what the transformer can be told to say; None where it can be told nothing.
        model_id: fingerprint of the file, whatever dtype it is loaded in.
        title: what its makers call it.
    """

    transformer: CausalAVTransformer
    text_encoder: TextEncoder
    video_codec: VideoCodec
    audio_codec: AudioCodec
    clock: Clock
    stream: StreamDefaults
    model_id: str
    device: torch.device
    dtype: torch.dtype
    title: str = ""
    transcript: TranscriptConfig | None = None

    @property
    def like(self) -> Tensor:
        """Empty tensor with the device and dtype that the transformer computes in."""
        return torch.empty(0, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Text embedding (1, m, c), float32."""
        return self.text_encoder.encode([text])

    @torch.no_grad()
    def prompt_of(self, context: Tensor, negative: Tensor | None = None) -> Prompt:
        """Text keys of embeddings (b, m, c); `negative` is what guidance leads away from."""
        like = next(self.transformer.parameters())

        def keys(embedding: Tensor) -> object:
            placed = embedding.to(device=like.device, dtype=self.dtype)
            return text_keys(self.transformer, placed, placed)

        return Prompt(keys(context), None if negative is None else keys(negative))

    def prompt(self, text: str, guided: bool = False) -> Prompt:
        """Text keys of a prompt and, where guidance will be used, of the empty prompt."""
        return self.prompts([text], guided)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str], guided: bool = False) -> Prompt:
        """The same for a batch of clips, one text each. What a text says is its transcript."""
        nothing = self.embed("") if guided else None
        prompt = self.prompt_of(self.text_encoder.encode(texts), nothing)
        said = tuple(map(self.transcript_of, texts))
        return prompt._replace(transcripts=said, texts=tuple(texts))

    def schedule(self, lines: Iterable[Line], guided: bool = False) -> Schedule:
        """A schedule of these lines, to which others may be told."""

        def encode(texts: tuple[str, ...]) -> Prompt | None:
            unknown = any(map(is_mark, texts))
            return None if unknown else self.prompts(texts, guided)

        return Schedule(self.clock, lines, encode)

    def transcript_of(self, text: str) -> Transcript | None:
        """What a prompt says, in a loop: its first run of units that the model can be told.

        A word of the prompt may say at which rate.
        """
        told = self.transcript
        if told is None:
            return None
        words = re.findall(r"[a-z]+", text.lower())
        runs = groupby(words, key=told.vocabulary.__contains__)
        said = next((list(run) for spoken, run in runs if spoken), None)
        if said is None:
            return None
        rate = next((told.rates[word] for word in words if word in told.rates), told.rate)
        return Transcript(tuple(map(told.vocabulary.index, said)), rate)

    def prompt_refusal(self, text: str) -> str | None:
        """Why a prompt says nothing to this model, in a sentence; None if it does."""
        # Vocabularies go by kinds of words (colours first), so the examples are from all of it.
        words = [word for word in self.text_encoder.config.vocabulary if len(word) > 2]
        known = ", ".join(words[:: len(words) // 12 or 1][:12])
        if not text.strip():
            return (
                f"the prompt is empty; say what should be seen and heard, in words such as: {known}"
            )
        if any(word in self.text_encoder.ids for word in re.findall(r"[a-z]+", text.lower())):
            return None
        return (
            f"the prompt {quoted(text)} has no word that this model knows; it knows words such as: "
            f"{known}"
        )

    def check_prompt(self, text: str) -> None:
        """Refuse a prompt that says nothing to this model.

        Raises:
            ValueError: the prompt is empty or has no word that the model knows.
        """
        refusal = self.prompt_refusal(text)
        if refusal:
            raise ValueError(refusal)

    def begin(self, seeds: tuple[int, ...] = (0,), window: int | None = None) -> StreamState:
        """The state before the first block of a new stream, one clip per seed."""
        kept = self.stream.window if window is None else window
        settings = StreamSettings(self.stream.height, self.stream.width, kept, seeds)
        return new_stream(self, settings)

    def decoder(self) -> StreamDecoder:
        """Latents to pictures and sound."""
        return StreamDecoder(self.video_codec, self.audio_codec)

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width of the pictures of a stream of the usual size."""
        return self.stream.height * SPACE_STRIDE, self.stream.width * SPACE_STRIDE


def shipped_model_path() -> Path:
    """Where the model that comes with this pack lies."""
    return Path(__file__).resolve().parents[1] / "models" / "mutual_forcing_small.safetensors"


def load_bundle(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    decode_device: torch.device | str | None = None,
    operations: object = nn,
    part: Callable[[TransformerConfig], Part] | None = None,
) -> Bundle:
    """Load a model file.

    Args:
        dtype: of the transformer; the codecs and the text encoder are small and stay in float32.
        decode_device: of the codecs, if it is another: pictures and sound are then decoded there.
        operations: namespace with `Linear` and `RMSNorm` for the transformer.
        part: what this process is to hold of the transformer, where several share it.

    Raises:
        TensorFileError: the file cannot be used; one sentence with what was found and the next
            step.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, "the model file", REMEDY)
    found = identify(tensors.keys(), metadata, path)
    if found.is_known and not found.fits("model"):
        raise TensorFileError(f"{path} is no Mutual Forcing model: {found.refusal()}")
    metadata = _unpacked_header(tensors) | metadata
    header = _header(path, metadata)
    try:
        configs = (
            TransformerConfig.from_dict(header.transformer),
            TextEncoderConfig.from_dict(header.text_encoder),
            VideoCodecConfig.from_dict(header.video_codec),
            AudioCodecConfig.from_dict(header.audio_codec),
        )
        told = header.transcript
        transcript = None if told is None else TranscriptConfig.from_dict(told)
        _check_together(*configs, header.stream, transcript)
        with BlankWeights():
            transformer = CausalAVTransformer(configs[0], operations=operations, device="meta")
            text_encoder, video_codec, audio_codec = (
                TextEncoder(configs[1]),
                VideoCodec(configs[2]),
                AudioCodec(configs[3]),
            )
    except (ValueError, TypeError) as error:
        raise TensorFileError(
            f"the model file {path} has a config that does not work ({reason_of(error)}); {REMEDY}"
        ) from error
    parts = {TRANSFORMER: transformer, TEXT: text_encoder, VIDEO: video_codec, AUDIO: audio_codec}
    _check_keys(path, parts, tensors)
    device = torch.device(device)
    decode_device = torch.device(decode_device or device)
    mine = None if part is None else part(configs[0])
    if mine is not None:
        mine.divide(transformer)
    for prefix, module in parts.items():
        part_dtype = dtype if prefix == TRANSFORMER else torch.float32
        place = decode_device if prefix in (VIDEO, AUDIO) else device
        weights = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if prefix == TRANSFORMER:
            weights = split_layout(weights, configs[0])
            if mine is not None:
                weights = {key: mine.cut(key, value) for key, value in weights.items()}
        weights = {
            key: value.to(device=place, dtype=part_dtype, copy=True)
            for key, value in weights.items()
        }
        module.load_state_dict(weights, strict=True, assign=True)
        module.to(place).eval().requires_grad_(False)
    return Bundle(
        transformer,
        text_encoder,
        video_codec,
        audio_codec,
        Clock.of(configs[0]),
        header.stream,
        _fingerprint(header, tensors),
        device,
        dtype,
        metadata.get("title", ""),
        transcript,
    )


def load_part(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    part: Callable[[TransformerConfig], Part],
) -> CausalAVTransformer:
    """What one process holds of a model file's transformer; errors as for `load_bundle`."""
    return load_bundle(path, dtype=dtype, device=device, decode_device="cpu", part=part).transformer


def save_bundle(
    path: Path | str,
    transformer: CausalAVTransformer,
    text_encoder: TextEncoder,
    video_codec: VideoCodec,
    audio_codec: AudioCodec,
    stream: StreamDefaults,
    *,
    transcript: TranscriptConfig | None = None,
    title: str,
    license_name: str = "GPL-3.0-or-later",
    dtype: torch.dtype = torch.bfloat16,
    codec_dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model file; one that lies at `path` is replaced only when the new one is whole.

    Args:
        dtype: of the matrices of transformer and text encoder; those that act for given pictures
            alone were trained for 8 bits (`picture_track.SIGHT_DTYPE`). Vectors (norms, biases,
            statistics) always stay float32: they cost nothing.
        codec_dtype: of the codecs' matrices; float16 has three bits more precision than bfloat16,
            which can be seen and heard.

    Raises:
        OSError: it cannot be written.
        ValueError: the parts do not fit together, or a weight is not finite.
    """
    modules = (transformer, text_encoder, video_codec, audio_codec)
    _check_together(*(module.config for module in modules), stream, transcript)
    parts = {TRANSFORMER: transformer, TEXT: text_encoder, VIDEO: video_codec, AUDIO: audio_codec}
    tensors = {}
    for prefix, module in parts.items():
        matrix_dtype = dtype if prefix in (TRANSFORMER, TEXT) else codec_dtype
        for key, value in module.state_dict().items():
            stored = matrix_dtype if value.ndim > 1 else torch.float32
            if prefix == TRANSFORMER and value.ndim > 1 and is_sight(key):
                stored = SIGHT_DTYPE
            kept = value.detach().cpu().to(stored)
            if not torch.isfinite(kept.float()).all():
                raise ValueError(
                    f"{prefix}{key} is not finite as {kept.dtype}; save an earlier checkpoint"
                )
            tensors[prefix + key] = kept
    header = _header_of(*modules, stream, transcript)
    metadata = {
        "format": FORMAT,
        "title": title,
        "license": license_name,
        "config": header.model_dump_json(),
    }
    write_tensors(Path(path), tensors, metadata, "the model file")


def _header_of(
    transformer: CausalAVTransformer,
    text_encoder: TextEncoder,
    video_codec: VideoCodec,
    audio_codec: AudioCodec,
    stream: StreamDefaults,
    transcript: TranscriptConfig | None,
) -> _Header:
    return _Header(
        # The weights in memory are in split order, whatever the file said that they came from.
        transformer=transformer.config.to_dict() | {"rope_type": "split"},
        text_encoder=text_encoder.config.to_dict(),
        video_codec=video_codec.config.to_dict(),
        audio_codec=audio_codec.config.to_dict(),
        stream=stream,
        transcript=None if transcript is None else transcript.to_dict(),
    )


def packed_header(bundle: Bundle) -> dict[str, Tensor]:
    """The metadata of a model file as a tensor of bytes, to lie beside the weights.

    For a host whose saving node writes tensors only; `load_bundle` reads it where the metadata has
    none.
    """
    parts = bundle.transformer, bundle.text_encoder, bundle.video_codec, bundle.audio_codec
    config = _header_of(*parts, bundle.stream, bundle.transcript).model_dump_json()
    text = _Packed(title=bundle.title, config=config).model_dump_json()
    return {PACKED_HEADER: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def _unpacked_header(tensors: dict[str, Tensor]) -> dict[str, str]:
    packed = tensors.pop(PACKED_HEADER, None)
    if packed is None or packed.dtype != torch.uint8:
        return {}
    try:
        return _Packed.model_validate_json(packed.numpy().tobytes()).model_dump()
    except ValueError:
        return {}


def _header(path: Path, metadata: Mapping[str, str]) -> _Header:
    if "config" not in metadata:
        raise TensorFileError(
            f"the model file {path} has no 'config' in its metadata, so it is not one of this "
            f"pack's models; {REMEDY}"
        )
    try:
        return _Header.model_validate_json(metadata["config"])
    except ValueError as error:
        raise TensorFileError(
            f"the model file {path} has a config that does not work ({reason_of(error)}); {REMEDY}"
        ) from error


def _check_together(
    transformer: TransformerConfig,
    text: TextEncoderConfig,
    video: VideoCodecConfig,
    audio: AudioCodecConfig,
    stream: StreamDefaults,
    transcript: TranscriptConfig | None,
) -> None:
    pairs = (
        ("in_channels", transformer.in_channels, "the video codec's", video.channels),
        ("out_channels", transformer.out_channels, "in_channels", transformer.in_channels),
        (
            "audio_in_channels",
            transformer.audio_in_channels,
            "the audio codec's",
            audio.latent_channels,
        ),
        (
            "audio_out_channels",
            transformer.audio_out_channels,
            "audio_in_channels",
            transformer.audio_in_channels,
        ),
        (
            "transcript_channels",
            transformer.transcript_channels,
            "the transcript's",
            0 if transcript is None else transcript.channels,
        ),
        ("caption_channels", transformer.caption_channels, "the text encoder's dim", text.dim),
        # The codecs' strides are fixed, and the clock counts by them.
        ("video_time_stride", transformer.video_time_stride, "the video codec's", TIME_STRIDE),
        ("video_space_stride", transformer.video_space_stride, "the video codec's", SPACE_STRIDE),
        ("audio_time_stride", transformer.audio_time_stride, "the audio codec's", LATENT_FRAMES),
        ("audio_hop_length", transformer.audio_hop_length, "the audio codec's hop", audio.hop),
        (
            "audio_sampling_rate",
            transformer.audio_sampling_rate,
            "the audio codec's",
            audio.sample_rate,
        ),
        (
            "audio_sampling_rate",
            transformer.audio_sampling_rate,
            "the stream's",
            stream.sample_rate,
        ),
        ("fps", transformer.fps, "the stream's", stream.fps),
    )
    for name, found, other, expected in pairs:
        if found != expected:
            raise ValueError(
                f"transformer config: {name} is {found}, expected {expected} ({other})"
            )


def _check_keys(path: Path, parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    expected = {
        prefix + key: tuple(value.shape)
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    check_shapes(f"the model file {path}", expected, found, REMEDY)
    for key, value in tensors.items():
        # Statistics and norms included; NaN would come out as a black clip, or as none.
        fits = value.dtype in STORED or (value.dtype == SIGHT_DTYPE and is_sight(key))
        if not fits or not torch.isfinite(value.float()).all():
            kind = str(value.dtype).removeprefix("torch.")
            raise TensorFileError(
                f"the model file {path} has {key} as {kind}, expected finite floating point; "
                f"{REMEDY}"
            )


def _fingerprint(header: _Header, tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits from the config and about 64 values of every stored tensor, before any cast."""

    def pieces() -> Iterator[bytes]:
        # A file without a transcript keeps the name that it had before there were any.
        left_out = {"stream"} | ({"transcript"} if header.transcript is None else set())
        parts = header.model_dump(exclude=left_out)
        yield json.dumps(parts, sort_keys=True).encode()
        for key in sorted(tensors):
            flat = tensors[key].flatten()
            yield f"{key} {tuple(tensors[key].shape)}".encode()
            yield flat[:: max(1, len(flat) // 64)].float().numpy().tobytes()

    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces():
        digest.update(piece)
    return digest.hexdigest()
