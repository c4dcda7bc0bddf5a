"""What the sampling nodes ask of a model, whichever of the two kinds is wired in."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from PIL import Image

from ..model_loaders.bundle import StreamDefaults
from ..networks.layout import BlockLayout
from ..samplers import model
from ..samplers.clock import Clock
from ..samplers.rollout import Mode, Prompt, SamplerSettings
from ..samplers.state import BlockLatents
from .conditioning import Conditioning


class StreamModel(model.StreamModel, Protocol):
    """A model that makes streams, with everything that the nodes need besides a rollout's.

    Attributes:
        clock: of its streams.
        defaults: size, window and mode of a stream unless told otherwise.
        audio_bins: frequency bins that its audio latents' channels are split into on a LATENT wire.
        text_tokens: length of a prompt's embedding.
    """

    clock: Clock
    defaults: StreamDefaults
    audio_bins: int
    text_tokens: int

    def at_rate(self, fps: float | Fraction | None) -> StreamModel:
        """The model for new streams of this frame rate; None = its own.

        Raises:
            ValueError: it cannot make streams of that rate.
        """
        ...

    def for_layout(self, layout: BlockLayout) -> StreamModel:
        """The model for going on with a stream of this layout; itself, if it makes no such ones."""
        ...

    def sampler(self, mode: Mode, steps: int | None, guidance: float | None) -> SamplerSettings:
        """Settings of a mode as this model wants it; None = the mode's own."""
        ...

    def make_ready(self, memory_required: int = 0) -> None:
        """Bring the weights to where they compute, with this many bytes free beside them."""
        ...

    def prompt_of(
        self, positive: Conditioning, negative: Conditioning | None, *, guided: bool
    ) -> Prompt:
        """Text keys of CONDITIONING wires; the model must be ready.

        Raises:
            ValueError: prompts that this model cannot use, in an artist's words.
        """
        ...

    def sketches(self, latents: BlockLatents) -> list[Image.Image]:
        """Small pictures of a block for a preview, where they cost next to nothing; else none."""
        ...
