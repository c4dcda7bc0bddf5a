"""What differs between checkpoints of the dual-stream transformer, in LTX-2's own names.

The defaults are LTX-2 19B's (arXiv 2601.03233; docs/omniforcing.md, section 1). A checkpoint
carries these as JSON in the safetensors metadata key `config`, under `transformer`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from .checked import Count, Positive, Width, check
from .layout import BlockLayout

RopeType = Literal["split", "interleaved"]
# RoPE turns pairs.
HeadDim = Annotated[int, Field(ge=2, le=1024, multiple_of=2)]
Stride = Annotated[int, Field(ge=1, le=4096)]
Latents = Annotated[int, Field(ge=1, le=1024)]

_LATER = frozenset(
    {
        "cross_attention_adaln",
        "apply_gated_attention",
        "caption_proj_before_connector",
        "memory_interval",
        "memory_video_dim",
        "memory_audio_dim",
        "memory_heads",
        "memory_film_hidden",
        "anchored_colours",
        "absolute_positions",
        "opening_blocks",
        "rotated_sinks",
        "picture_track_hidden",
        "picture_track_channels",
        "picture_track_rank",
    }
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes, positional embedding and causality of one checkpoint."""

    num_layers: Count = 48
    num_attention_heads: Count = 32
    attention_head_dim: HeadDim = 128
    audio_num_attention_heads: Count = 32
    audio_attention_head_dim: HeadDim = 64
    in_channels: Width = 128
    out_channels: Width = 128
    audio_in_channels: Width = 128
    audio_out_channels: Width = 128
    cross_attention_dim: Width = 4096
    audio_cross_attention_dim: Width = 2048
    caption_channels: Width = 3840
    norm_eps: Positive = 1e-6
    rope_type: RopeType = "interleaved"
    frequencies_precision: Literal["float32", "float64"] = "float32"
    positional_embedding_theta: Positive = 10000.0
    positional_embedding_max_pos: tuple[Positive, Positive, Positive] = (20, 2048, 2048)
    audio_positional_embedding_max_pos: tuple[Positive] = (20,)
    use_middle_indices_grid: bool = True
    timestep_scale_multiplier: Positive = 1000.0
    av_ca_timestep_scale_multiplier: Positive = 1.0
    # The geometry of the codecs, which the positions are measured in.
    fps: Positive = 24.0
    video_time_stride: Stride = 8
    video_space_stride: Stride = 32
    audio_time_stride: Stride = 4
    audio_hop_length: Stride = 160
    audio_sampling_rate: Annotated[int, Field(ge=1, le=384000)] = 16000
    # Causality (OmniForcing, arXiv 2603.11647, sections 3.2, 3.3), two modes (Mutual Forcing).
    video_first_block: Latents = 1
    audio_first_block: Latents = 1
    video_next_block: Latents = 3
    audio_next_block: Latents = 25
    num_audio_sink_tokens: Annotated[int, Field(ge=0, le=1024)] = 0
    # Sinks at the first places in time, the sound after them (OmniForcing's Table 3, "Incr. RoPE").
    rotated_sinks: bool = False
    step_size_embedding: bool = False
    # Numbers per audio latent of the timed transcript (`transcript.py`); 0: it is told none.
    transcript_channels: Annotated[int, Field(ge=0, le=65536)] = 0
    # Widths of what reads given pictures for the sound, and rank of the adapters that listen to it
    # (`picture_track.py`); 0: the sound is told nothing.
    picture_track_hidden: Annotated[int, Field(ge=0, le=65536)] = 0
    picture_track_channels: Annotated[int, Field(ge=0, le=65536)] = 0
    picture_track_rank: Annotated[int, Field(ge=0, le=1024)] = 0
    # Rank of the adapters that act in few-step mode alone (`few_step.py`); 0: both modes share all.
    few_step_rank: Annotated[int, Field(ge=0, le=1024)] = 0
    # LTX-2.3 (docs/ltx23.md, section 1), by the names in its header: text queries, keys and values
    # modulated with the noise level; a gate per head; captions projected before the connectors.
    cross_attention_adaln: bool = False
    apply_gated_attention: bool = False
    caption_proj_before_connector: bool = False
    # TaoMate (docs/ltx23.md, sections 3 to 5): a memory branch in every so many layers, 0: none;
    # whether every block is given block 0's colours; positions that stay as a stream grows; blocks
    # from the first on that all see all before them.
    memory_interval: Annotated[int, Field(ge=0, le=256)] = 0
    memory_video_dim: Width = 512
    memory_audio_dim: Width = 256
    memory_heads: Count = 8
    memory_film_hidden: Width = 256
    anchored_colours: bool = False
    absolute_positions: bool = False
    opening_blocks: Annotated[int, Field(ge=0, le=64)] = 0

    @property
    def video_dim(self) -> int:
        """Width of the video tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio tokens; also the inner width of both cross-modal attentions."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def table_rows(self) -> int:
        """Vectors of a layer's own table: shift, scale, gate of each part that it modulates."""
        return 9 if self.cross_attention_adaln else 6

    def remembers(self, layer: int) -> bool:
        """Whether a layer has a memory branch."""
        return bool(self.memory_interval) and (layer + 1) % self.memory_interval == 0

    @property
    def keeps_memory(self) -> bool:
        """Whether a stream has a memory (`samplers/stream_memory.py`)."""
        return bool(self.memory_interval) or self.anchored_colours

    @property
    def layout(self) -> BlockLayout:
        """Latents per block."""
        return BlockLayout(
            self.video_first_block,
            self.audio_first_block,
            self.video_next_block,
            self.audio_next_block,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; what LTX-2.3 has and this network has not is left out.

        So fingerprints of networks that were made before it are what they were.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        off = {field.name for field in fields(self) if values[field.name] == field.default}
        return {k: v for k, v in values.items() if k not in _LATER or k not in off}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> TransformerConfig:
        """Build from JSON; keys that this class does not know (LTX-2 has many) are left out.

        `video_blocks` / `audio_blocks` (lists of block sizes) are understood as a block layout.

        Raises:
            ValueError: a value has the wrong type or is out of range; names the key.
        """
        known = {field.name for field in fields(cls)}
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        if "video_blocks" in values and "audio_blocks" in values:
            layout = BlockLayout.from_blocks(
                list(values["video_blocks"]), list(values["audio_blocks"])
            )
            kept |= {
                "video_first_block": layout.video_first,
                "audio_first_block": layout.audio_first,
                "video_next_block": layout.video_next,
                "audio_next_block": layout.audio_next,
            }
        config = cls(**kept)
        config.validate()
        return config

    def validate(self) -> None:
        """Refuse sizes that the network cannot be built with.

        Raises:
            ValueError: naming the key, the value and what would fit.
        """
        check(self, "transformer config")
        if self.few_step_rank and not self.step_size_embedding:
            raise ValueError(
                "transformer config: step_size_embedding is false, expected true beside a "
                f"few_step_rank of {self.few_step_rank}"
            )
        names = ("picture_track_hidden", "picture_track_channels", "picture_track_rank")
        sizes = [getattr(self, name) for name in names]
        if any(sizes) and not all(sizes):
            found = ", ".join(f"{name} is {size}" for name, size in zip(names, sizes, strict=True))
            raise ValueError(f"transformer config: {found}, expected all of them or none")
        for name in ("memory_video_dim", "memory_audio_dim"):
            if self.memory_interval and getattr(self, name) % self.memory_heads:
                raise ValueError(
                    f"transformer config: {name} is {getattr(self, name)}, expected a multiple of "
                    f"memory_heads ({self.memory_heads})"
                )
