"""A MODEL as a maker of streams: what the sampling nodes ask of it, whatever the model is.

b batch, m text tokens, c channels.
One class for every MODEL. What sets one kind of model apart from another is data (`Kind`, in
`kinds.py`); what a loader of this pack knows of a file and ComfyUI does not (`CausalModel`) travels
with the MODEL as an attachment, which its clones (a LoRA loader's, for instance) keep. Imports
nothing of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from ..model_loaders.bundle import StreamDefaults
from ..model_loaders.rate import at_rate, rate_of
from ..networks.attention import AttentionKernel
from ..networks.config import TransformerConfig
from ..networks.execution import one_thread
from ..networks.layer import Text
from ..networks.layout import BlockLayout
from ..networks.transformer import text_keys
from ..samplers.clock import Clock
from ..samplers.rollout import Method, Mode, Prompt, SamplerSettings, sampler_settings
from ..samplers.schedule import Schedule, is_mark
from ..samplers.side_ranks import PROMPT, UNGUIDED, SideRanks
from ..samplers.sigmas import OMNIFORCING
from ..samplers.state import BlockLatents
from .conditioning import (
    REFUSAL,
    TRANSCRIPT,
    UNPROCESSED,
    Conditioning,
    Encode,
    lines_of,
    only_entry,
)
from .transformer_view import TransformerView

Loader = Callable[[int, Sequence[object]], None]
ATTACHMENT = "mutual_forcing"
"""Name under which a `CausalModel` travels with a MODEL."""
NARROW = 1024
"""Width from which on a layer is work enough for several threads."""


@dataclass(frozen=True)
class Kind:
    """What sets one kind of model apart from another.

    Attributes:
        audio_bins: frequency bins that its audio latents' channels are split into on a LATENT wire.
        encoder: what to connect where a prompt was encoded for another model.
        contexts: (network, embedding (b, m, c), its extras) to one context for each modality.
        widths: widths that an embedding may have, the usual one first.
        few_step_method: how few-step mode goes from step to step where the network is not told its
            step size.
        few_step_entries: which noise levels of LTX-2's list it visits.
        any_rate: whether it makes streams of other frame rates than its own.
        least: rows and columns of latents that its decoder needs.
    """

    audio_bins: int
    encoder: str
    contexts: Callable[[nn.Module, Tensor, Mapping[str, object]], tuple[Tensor, Tensor]]
    widths: Callable[[TransformerConfig], tuple[int, ...]]
    few_step_method: Method = "euler"
    few_step_entries: tuple[int, ...] = OMNIFORCING
    any_rate: bool = False
    least: int = 1


@dataclass(frozen=True)
class CausalModel:
    """What a loader knows of a causal model beyond its weights.

    Attributes:
        config: how to run the network; the layout of its positions is that of its weights.
        model_id: fingerprint; a stream goes on only with the model that made it.
        defaults: size, window and mode of a stream unless told otherwise.
        text_tokens: length of a prompt's embedding; a prompt of another length is refused if
            `fixed_length`.
        title: what its makers call it.
        empty: embedding (1, m, c) of the empty prompt, which guidance leads away from where no
            negative prompt is connected; None: then there must be one.
        vae, audio_vae, clip: its own VAEs and CLIP, for nodes that no other is connected to; None
            where the file had none.
        connected: whether it has what prepares a prompt, as far as it needs any.
        remarks: what an artist should know of its files, in sentences.
        ranks: the processes beside this one that hold the rest of it; None where all is here.
    """

    kind: Kind
    config: TransformerConfig
    model_id: str
    defaults: StreamDefaults
    text_tokens: int
    title: str = ""
    fixed_length: bool = False
    empty: Tensor | None = field(default=None, repr=False)
    vae: object | None = field(default=None, repr=False)
    audio_vae: object | None = field(default=None, repr=False)
    clip: object | None = field(default=None, repr=False)
    connected: bool = True
    remarks: tuple[str, ...] = ()
    ranks: SideRanks | None = field(default=None, repr=False)


@dataclass(frozen=True)
class StreamModel:
    """A causal network that makes streams, with everything that a rollout needs.

    Attributes:
        module: ComfyUI's network.
        about: what is known of it.
        like: empty tensor with the device and dtype to compute in.
        kernel: softmax attention.
        load: brings the weights to where they compute, with that many bytes free beside them,
            together with other ModelPatchers' weights.
        picture: a small picture of one video latent (1, c, 1, h, w); None where there are no
            previews.
    """

    module: nn.Module = field(repr=False)
    about: CausalModel
    like: Tensor
    kernel: AttentionKernel
    load: Loader
    picture: Callable[[Tensor], Image.Image] | None = None

    @cached_property
    def transformer(self) -> TransformerView:
        """ComfyUI's network under the functions of `networks`."""
        return TransformerView(self.module, self.about.config, self.kernel)

    def fitting_threads(self) -> AbstractContextManager[None]:
        """In the body a small network on a CPU computes in one thread: a second one brings nothing,
        and on a core that a browser draws on, the two wait for each other.
        """
        is_small = self.like.device.type == "cpu" and self.about.config.video_dim < NARROW
        return one_thread() if is_small else nullcontext()

    @property
    def model_id(self) -> str:
        """Fingerprint; a stream goes on only with the model that made it."""
        return self.about.model_id

    @property
    def title(self) -> str:
        """What its makers call it; empty where this pack did not load it."""
        return self.about.title

    @cached_property
    def clock(self) -> Clock:
        """Blocks, latents and frames; samples as its audio latents count them (16 kHz)."""
        return Clock.of(self.about.config)

    @property
    def few_steps(self) -> tuple[int, ...]:
        """How many steps few-step mode was trained with."""
        usual = len(self.about.kind.few_step_entries) - 1
        # A network that is told its step size halves it as well.
        return (usual, 2 * usual) if self.about.config.step_size_embedding else (usual,)

    @property
    def audio_bins(self) -> int:
        """See `Kind`."""
        return self.about.kind.audio_bins

    def at_rate(self, fps: float | Fraction | None) -> StreamModel:
        """The model for new streams of this frame rate; None = its own.

        Raises:
            ValueError: it cannot make streams of that rate.
        """
        if fps is None or fps == self.clock.fps:
            return self
        if not self.about.kind.any_rate:
            raise ValueError(
                f"the frame rate is {float(fps):g}, and this model makes {float(self.clock.fps):g} "
                "frames a second: take LTXVConditioning out of the way"
            )
        return replace(self, about=replace(self.about, config=at_rate(self.about.config, fps)))

    def for_layout(self, layout: BlockLayout) -> StreamModel:
        """The model for going on with a stream of this layout; itself, if it makes no such ones."""
        try:
            found = self.at_rate(rate_of(self.about.config, layout))
        except ValueError:
            return self
        return found if found.clock.layout == layout else self

    def sampler(self, mode: Mode, steps: int | None, guidance: float | None) -> SamplerSettings:
        """Settings of a mode as this model wants it; None = the mode's own."""
        told = mode == "multi" or self.about.config.step_size_embedding
        method = "euler" if told else self.about.kind.few_step_method
        entries = self.about.kind.few_step_entries
        return sampler_settings(mode, steps, guidance, method, entries)

    @torch.no_grad()
    def prompt_of(
        self, positive: Conditioning, negative: Conditioning | None, *, guided: bool
    ) -> Prompt:
        """Text keys of CONDITIONING wires; the weights must be where they compute.

        Args:
            negative: what to steer away from; None = the empty prompt.
            guided: whether guidance will ask for the second prompt at all.

        Raises:
            ValueError: prompts that this model cannot use, in an artist's words.
        """
        unwanted = self._unwanted(negative) if guided else None
        unguided = unwanted and self._keys(unwanted, "negative prompt")
        return self._prompt(positive, unguided)

    @torch.no_grad()
    def schedule_of(
        self,
        positive: Conditioning,
        negative: Conditioning | None,
        encode: Encode | None,
        *,
        guided: bool,
    ) -> Schedule:
        """A schedule out of CONDITIONING wires; their keys are made when they are due.

        Args:
            encode: for texts that are not on the wire: those that the stream followed before, and
                those that are told while it runs.
            negative, guided: as for `prompt_of`, errors likewise.
        """
        lines = lines_of(positive)
        unwanted = self._unwanted(negative) if guided else None
        entries = {line.texts: [entry] for line, entry in zip(lines, positive, strict=True)}
        for entry in entries.values():
            self.check_prompt(entry)

        @cache
        def unguided() -> Text | None:
            return unwanted and self._keys(unwanted, "negative prompt")

        def prompt(texts: tuple[str, ...]) -> Prompt | None:
            entry = entries.get(texts)
            if entry is None and encode is not None and not is_mark(texts[0]):
                entry = encode(texts[0])
            return entry and self._prompt(entry, unguided())._replace(texts=texts)

        return Schedule(self.clock, lines, prompt)

    def sketches(self, latents: BlockLatents) -> list[Image.Image]:
        """Small pictures of a block for a preview, where they cost next to nothing; else none."""
        if self.picture is None:
            return []
        return [self.picture(latent) for latent in latents.video[:1].split(1, dim=2)]

    def remarks_on(self, positive: Conditioning) -> Iterator[str]:
        """What its text encoder does not say about the prompts of a wire."""
        longest = max((embedding.shape[1] for embedding, _ in positive), default=0)
        if longest > self.about.text_tokens:
            yield (
                f"a prompt has {longest} tokens, and this model learned with "
                f"{self.about.text_tokens}: shorten it"
            )

    def check_prompt(self, positive: Conditioning) -> dict[str, object]:
        """The extras of a prompt that this model can use.

        Raises:
            ValueError: it cannot, or the prompt says nothing to it.
        """
        _, extras = self._checked(positive, "prompt")
        if extras.get(REFUSAL):
            raise ValueError(extras[REFUSAL])
        return extras

    def _prompt(self, positive: Conditioning, unguided: Text | None) -> Prompt:
        extras = self.check_prompt(positive)
        return Prompt(self._keys(positive, "prompt"), unguided, (extras.get(TRANSCRIPT),))

    def _unwanted(self, negative: Conditioning | None) -> Conditioning:
        if negative is None and self.about.empty is None:
            raise ValueError(
                "guidance needs a second prompt to lead away from: connect another CLIP Text "
                "Encode to 'negative' (its text may be empty), or set guidance to 1"
            )
        unwanted = [[self.about.empty, {}]] if negative is None else negative
        self._checked(unwanted, "negative prompt")
        return unwanted

    def _keys(self, conditioning: Conditioning, name: str) -> Text:
        embedding, extras = self._checked(conditioning, name)
        contexts = self.about.kind.contexts(self.module, embedding.to(self.like), extras)
        if self.about.ranks is not None:
            which = PROMPT if name == "prompt" else UNGUIDED
            return self.about.ranks.text_keys(self.transformer, which, *contexts)
        return text_keys(self.transformer, *contexts)

    def _checked(self, conditioning: Conditioning, name: str) -> tuple[Tensor, dict[str, object]]:
        embedding, extras = only_entry(conditioning, name)
        about = self.about
        if extras.get(UNPROCESSED) and not about.connected:
            raise ValueError(
                f"the {name} has not been through LTX-2's connectors, and the model was loaded "
                "without them: choose LTX-2's own file, or its connectors, as base in Load "
                "OmniForcing Model"
            )
        widths = about.kind.widths(about.config)
        if embedding.ndim != 3 or embedding.shape[-1] not in widths:
            raise ValueError(
                f"the {name} was encoded for another model (embedding {tuple(embedding.shape)}, "
                f"expected width {widths[0]}): {about.kind.encoder}"
            )
        if about.fixed_length and embedding.shape[1] != about.text_tokens:
            raise ValueError(
                f"the {name} is {embedding.shape[1]} tokens long, and this model reads "
                f"{about.text_tokens}: write everything into one CLIP Text Encode, without "
                "Conditioning (Concat)"
            )
        return embedding, extras
