"""Which latents belong to which one-second block: integers only, no torch.

A block holds one second of both modalities: 3 video latents and 25 audio latents (OmniForcing,
arXiv 2603.11647, section 3.2). Block 0 is the global prefix. In the paper it holds 1 + 1 latents
(`1+3k / 1+25k`), in the released code 4 + 26 (`4+3k / 26+25k`), because both codecs treat their
first frame with stride 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checked import quoted

VIDEO_PER_BLOCK = 3
AUDIO_PER_BLOCK = 25


@dataclass(frozen=True)
class BlockLayout:
    """Latents per block of both modalities; block 0, the global prefix, may have its own size."""

    video_first: int = 1
    audio_first: int = 1
    video_next: int = VIDEO_PER_BLOCK
    audio_next: int = AUDIO_PER_BLOCK

    def __post_init__(self) -> None:
        for name in ("video_first", "audio_first", "video_next", "audio_next"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"block layout: {name} is {quoted(value)}, expected at least 1 latent per block"
                )

    @classmethod
    def from_blocks(cls, video_blocks: list[int], audio_blocks: list[int]) -> BlockLayout:
        """Layout of block sizes such as [4, 3, 3] and [26, 25, 25]; equal but for the first."""
        if len(video_blocks) != len(audio_blocks) or not video_blocks:
            raise ValueError(
                f"block layout: found {len(video_blocks)} video and {len(audio_blocks)} audio "
                "blocks, "
                "expected the same number, at least one"
            )
        if len(set(video_blocks[1:])) > 1 or len(set(audio_blocks[1:])) > 1:
            raise ValueError(
                f"block layout: found video blocks {video_blocks} and audio blocks {audio_blocks}, "
                "expected all blocks after the first to have one size"
            )
        default = cls()
        return cls(
            video_blocks[0],
            audio_blocks[0],
            video_blocks[1] if len(video_blocks) > 1 else default.video_next,
            audio_blocks[1] if len(audio_blocks) > 1 else default.audio_next,
        )

    def video_span(self, block: int) -> tuple[int, int]:
        """First and one-past-last video latent of a block."""
        return _span(block, self.video_first, self.video_next)

    def audio_span(self, block: int) -> tuple[int, int]:
        """First and one-past-last audio latent of a block."""
        return _span(block, self.audio_first, self.audio_next)

    def video_latents(self, blocks: int) -> int:
        """Video latents in the first `blocks` blocks, the prefix counted as one."""
        return self.video_span(blocks - 1)[1] if blocks else 0

    def audio_latents(self, blocks: int) -> int:
        """Audio latents in the first `blocks` blocks, the prefix counted as one."""
        return self.audio_span(blocks - 1)[1] if blocks else 0

    def blocks(self, video_latents: int, audio_latents: int) -> int:
        """Number of blocks that these latents fill exactly.

        Raises:
            ValueError: the lengths do not fit the layout or disagree with each other.
        """
        count, rest = divmod(video_latents - self.video_first, self.video_next)
        if rest or count < 0 or self.audio_latents(count + 1) != audio_latents:
            raise ValueError(
                f"found {video_latents} video and {audio_latents} audio latents, expected "
                f"{self.video_first}+{self.video_next}k and {self.audio_first}+{self.audio_next}k "
                "with one k; cut both modalities at the same block"
            )
        return count + 1


def _span(block: int, first: int, following: int) -> tuple[int, int]:
    if block < 0:
        raise ValueError(f"block index is {block}, expected 0 or more")
    if block == 0:
        return 0, first
    start = first + (block - 1) * following
    return start, start + following


PAPER_LAYOUT = BlockLayout(1, 1)
RELEASED_LAYOUT = BlockLayout(4, 26)
