"""A clip at a glance: a row of its frames with the waveform under them on one time axis.

b batch, F H W pixel frames and size, n samples. Blocks are taken in as they are made and only what
will be drawn is kept, so a sheet of an hour costs as little as one of ten seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from .clock import Clock

FRAMES = 11
_ENVELOPE_SECONDS = 0.01


class ContactSheet:
    """Collects frames and the outline of the sound, then draws them.

    Args:
        clock: frame rate and sample rate.
        total_frames: how long the clip is meant to be; the frames shown are spread evenly over it.
        columns: how many frames are shown.
    """

    def __init__(self, clock: Clock, total_frames: int, columns: int = FRAMES) -> None:
        self.clock = clock
        columns = max(1, min(columns, total_frames))
        self.wanted = {round(i) for i in np.linspace(0, total_frames - 1, columns)}
        self.pictures: list[tuple[int, np.ndarray]] = []
        self.lows: list[np.ndarray] = []
        self.highs: list[np.ndarray] = []
        self.frames = 0
        self._step = max(1, round(clock.sample_rate * _ENVELOPE_SECONDS))
        self._rest = np.zeros(0, np.float32)

    def add(self, video: Tensor, audio: Tensor) -> None:
        """Take in the next block: pictures (b, F, H, W, 3) in 0..1 and sound (b, 1, n).

        Of a batch the first clip is shown.
        """
        for picture in video[0]:
            if self.frames in self.wanted:
                self.pictures.append((self.frames, (picture * 255).round().byte().numpy()))
            self.frames += 1
        sound = np.concatenate([self._rest, audio[0, 0].float().numpy()])
        whole = len(sound) // self._step * self._step
        steps, self._rest = sound[:whole].reshape(-1, self._step), sound[whole:]
        self.lows.append(steps.min(axis=1))
        self.highs.append(steps.max(axis=1))

    def save(self, path: Path | str, title: str = "") -> None:
        """Draw what was collected into a PNG.

        Raises:
            ValueError: nothing was collected.
            OSError: the file cannot be written.
        """
        if not self.pictures:
            raise ValueError("the contact sheet has no frame to show; add a block before saving it")
        # The object interface, not pyplot: no global figure, no window system.
        from matplotlib.figure import Figure

        count = len(self.pictures)
        figure = Figure(figsize=(1.3 * count + 0.6, 3.0), dpi=120, layout="constrained")
        grid = figure.add_gridspec(2, count, height_ratios=(1.3, 1))
        for column, (frame, picture) in enumerate(self.pictures):
            axes = figure.add_subplot(grid[0, column])
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(f"{float(frame / self.clock.fps):.1f} s", fontsize=8)
            axes.set_axis_off()
        wave = figure.add_subplot(grid[1, :])
        lows, highs = np.concatenate(self.lows), np.concatenate(self.highs)
        seconds = np.arange(len(lows)) * self._step / self.clock.sample_rate
        wave.fill_between(seconds, lows, highs, color="#2a6f97", linewidth=0.4)
        wave.set_xlim(0, max(float(self.frames / self.clock.fps), 1e-3))
        wave.set_ylim(-1, 1)
        wave.set_xlabel("seconds", fontsize=8)
        wave.tick_params(labelsize=7)
        if title:
            figure.suptitle(title, fontsize=9)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
