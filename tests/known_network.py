"""A network whose velocity is known in closed form, made of the real class by choosing its weights.

With sigma the noise level, d the step size and p the number that the prompt stands for, every
latent x of a modality has the velocity

    v = x_rate x + sigma_rate sin(sigma) + d_rate sin(d) + prompt_rate p + memory m

where m is the mean of channel 0 over all tokens of the same modality that the token sees. So what a
loss or a sampler makes of it can be worked out on paper, past included. The network runs in
float64; two channels of a million keep the norms linear in all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mutual_forcing.lab.training.system import EmbeddedSystem
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.transformer import CausalAVTransformer
from torch import Tensor, nn

CHANNELS, WIDTH, LARGE = 2, 16, 1e6
SIZE = LARGE * (2 / WIDTH) ** 0.5
"""Root mean square of a token, which every norm divides by."""
ZERO, TIMES, PROMPT, MEMORY = 5, 4, 6, 7
# sin(1000 t / 1000) is this of the 256 features of a time: frequency 10000^(-96/128) = 1/1000.
SINE = 128 + 96


class Rates(NamedTuple):
    """What the velocity of one modality is made of."""

    x: float
    sigma: float
    d: float
    prompt: float
    memory: float

    def velocity(
        self, x: Tensor, sigma: object, d: object = 0.0, prompt: object = 0.0, memory: object = 0.0
    ) -> Tensor:
        """The closed form; all of what is given broadcasts to x."""
        sines = self.sigma * torch.sin(torch.as_tensor(sigma)) + self.d * torch.sin(
            torch.as_tensor(d)
        )
        return self.x * x + sines + self.prompt * prompt + self.memory * memory


VIDEO = Rates(x=0.5, sigma=-0.8, d=0.3, prompt=0.2, memory=0.4)
AUDIO = Rates(x=-0.4, sigma=0.6, d=-0.7, prompt=-0.3, memory=0.25)

CONFIG = TransformerConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=WIDTH // 2,
    audio_num_attention_heads=2, audio_attention_head_dim=WIDTH // 2, in_channels=CHANNELS,
    out_channels=CHANNELS, audio_in_channels=CHANNELS, audio_out_channels=CHANNELS,
    cross_attention_dim=WIDTH, audio_cross_attention_dim=WIDTH, caption_channels=1,
    rope_type="split", step_size_embedding=True,
)  # fmt: skip


def known_transformer(
    video: Rates = VIDEO, audio: Rates = AUDIO, config: TransformerConfig = CONFIG
) -> CausalAVTransformer:
    """The network; of its parameters the heads' biases add to the velocity as they are."""
    model = CausalAVTransformer(config, dtype=torch.float64)
    block = model.transformer_blocks[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _set(
            video,
            model.patchify_proj,
            model.adaln_single.emb,
            model.caption_projection,
            block.attn1,
            block.attn2,
            block.scale_shift_table,
            model.proj_out,
        )
        _set(
            audio,
            model.audio_patchify_proj,
            model.audio_adaln_single.emb,
            model.audio_caption_projection,
            block.audio_attn1,
            block.audio_attn2,
            block.audio_scale_shift_table,
            model.audio_proj_out,
        )
    return model


def _set(
    rates: Rates,
    patchify: nn.Linear,
    embedders: nn.Module,
    caption: nn.Module,
    own: nn.Module,
    text: nn.Module,
    table: Tensor,
    head: nn.Linear,
) -> None:
    for channel in range(CHANNELS):
        patchify.weight[channel, channel] = 1
    patchify.bias[2], patchify.bias[3] = LARGE, -LARGE
    # silu(z) - silu(-z) = z and gelu(z) - gelu(-z) = z: two hidden channels pass a number through.
    for embedder, rate in (
        (embedders.timestep_embedder, rates.sigma),
        (embedders.step_size_embedder, rates.d),
    ):
        embedder.linear_1.weight[0, SINE], embedder.linear_1.weight[1, SINE] = 1, -1
        embedder.linear_2.weight[TIMES, 0], embedder.linear_2.weight[TIMES, 1] = rate, -rate
    caption.linear_1.weight[0, 0], caption.linear_1.weight[1, 0] = 1, -1
    caption.linear_2.weight[0, 0], caption.linear_2.weight[0, 1] = 1, -1
    # Queries and keys are zero, so attention is the mean of the values.
    text.to_v.weight[0, 0] = text.to_out[0].weight[PROMPT, 0] = 1
    own.to_v.weight[0, 0] = SIZE
    own.to_out[0].weight[MEMORY, 0] = table[2, MEMORY] = 1
    for out in range(CHANNELS):
        for channel, rate in ((out, rates.x), (PROMPT, rates.prompt), (MEMORY, rates.memory)):
            head.weight[out, channel] += SIZE * rate
            # Layer norm takes the mean of all channels away; this one has nothing else.
            head.weight[out, ZERO] -= SIZE * rate
        head.weight[out, TIMES] = 1


def known_system(video: Rates = VIDEO, audio: Rates = AUDIO, empty: float = 0.0) -> EmbeddedSystem:
    """The network as what is trained; a prompt's embedding is a number for each modality."""
    return EmbeddedSystem(known_transformer(video, audio), torch.full((1, 2, 1), empty))


def prompts(*numbers: tuple[float, float]) -> Tensor:
    """Embeddings (b, 1, 2, 1) of what the prompts stand for, to video and to audio."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None, :, None]
