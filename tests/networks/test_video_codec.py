"""The video codec: a stream in any cut is the whole, nothing looks ahead, errors say why."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from mutual_forcing.networks.video_codec import VideoCodec, VideoCodecConfig, latent_frames

CONFIG = VideoCodecConfig(latent_channels=4, fine_width=8, middle_width=8, coarse_width=12)


@pytest.fixture(scope="module")
def codec() -> VideoCodec:
    torch.manual_seed(0)
    codec = VideoCodec(CONFIG).eval().requires_grad_(False)
    codec.latent_mean.normal_()
    codec.latent_std.uniform_(0.5, 2.0)
    return codec


def latents(frames: int, height: int = 2, width: int = 3) -> torch.Tensor:
    return torch.randn(
        2, 16, frames, height, width, generator=torch.Generator().manual_seed(frames)
    )


@pytest.mark.parametrize("cut", [(7,), (1, 6), (1, 3, 3), (2, 1, 4), (1,) * 7, (4, 1, 1, 1)])
def test_streaming_in_any_cut_is_the_whole(codec: VideoCodec, cut: tuple[int, ...]) -> None:
    whole, _ = codec.decode(latents(7))
    parts, state = [], None
    for chunk in latents(7).split(cut, dim=2):
        video, state = codec.decode(chunk, state)
        parts.append(video)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=0)


def test_decode_leaves_the_given_state_as_it_was(codec: VideoCodec) -> None:
    _, state = codec.decode(latents(2))
    before = [x.clone() for x in state]
    first, _ = codec.decode(latents(3), state)
    again, _ = codec.decode(latents(3), state)
    assert isinstance(state, tuple)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert torch.equal(first, again)


@pytest.mark.parametrize("changed", range(1, 5))
def test_a_later_latent_changes_no_earlier_frame(codec: VideoCodec, changed: int) -> None:
    latent = latents(5)
    other = latent.clone()
    other[:, :, changed:] += 1.0
    first, second = codec.decode(latent)[0], codec.decode(other)[0]
    frames = 8 * changed - 7
    assert torch.equal(first[:, :, :frames], second[:, :, :frames])
    assert not torch.equal(first[:, :, frames], second[:, :, frames])


@pytest.mark.parametrize("changed", [1, 8, 9, 12, 16])
def test_a_later_frame_changes_no_earlier_latent(codec: VideoCodec, changed: int) -> None:
    video = torch.rand(1, 3, 17, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = video.clone()
    other[:, :, changed:] *= -1.0
    first, second = codec.encode(video), codec.encode(other)
    same = 1 + (changed - 1) // 8  # latents whose last frame, 8j, comes before the change
    assert torch.equal(first[:, :, :same], second[:, :, :same])
    assert not torch.equal(first[:, :, same], second[:, :, same])


def test_shapes_and_normalised_latents(codec: VideoCodec) -> None:
    video = torch.rand(2, 3, 17, 64, 96, generator=torch.Generator().manual_seed(0))
    latent = codec.encode(video)
    assert latent.shape == (2, 16, 3, 2, 3)
    mean, logvar = codec.encode_moments(video)
    assert logvar.shape == mean.shape
    unfolded = rearrange(latent, "b (c y x) f h w -> b c f (h y) (w x)", y=2, x=2)
    raw = unfolded * codec.latent_std.view(1, -1, 1, 1, 1) + codec.latent_mean.view(1, -1, 1, 1, 1)
    assert torch.allclose(raw, mean, atol=1e-5)
    output, state = codec.decode(latent)
    assert output.shape == video.shape
    assert codec.decode(latent[:, :, :2], state)[0].shape == (2, 3, 16, 64, 96)


@pytest.mark.parametrize("frames", [0, 2, 8, 16, 24, 26])
def test_wrong_frame_count_is_named(codec: VideoCodec, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"{frames} frames, expected 1 \+ 8k"):
        codec.encode(torch.zeros(1, 3, frames, 32, 32))
    assert [latent_frames(n) for n in (1, 9, 25)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 9, 32, 48), "multiples of 32"),
        ((1, 4, 9, 32, 32), r"expected \(batch, 3"),
        ((3, 9, 32, 32), r"expected \(batch, 3"),
    ],
)
def test_wrong_video_shape_is_named(
    codec: VideoCodec, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape))


def test_wrong_latent_and_state_are_named(codec: VideoCodec) -> None:
    with pytest.raises(ValueError, match="expected"):
        codec.decode(torch.zeros(1, 5, 2, 2, 2))
    _, state = codec.decode(latents(1))
    with pytest.raises(ValueError, match="start a new one"):
        codec.decode(latents(1, height=4), state)
    with pytest.raises(ValueError, match="state"):
        codec.decode(latents(1), state[:1])


def test_config_survives_json() -> None:
    assert VideoCodecConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="unknown"):
        VideoCodecConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="fine_width is 0"):
        VideoCodecConfig(fine_width=0)


def test_the_shipped_size_stays_small() -> None:
    assert sum(p.numel() for p in VideoCodec().parameters()) <= 1_200_000
