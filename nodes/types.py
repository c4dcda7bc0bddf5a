"""The wires that are this pack's own, and what travels on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from comfy_api.latest import io

from ..host.stream_model import StreamModel
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.rollout import new_stream
from ..samplers.start import Start
from ..samplers.state import StreamSettings, StreamState

ModelWire = io.Custom("MF_MODEL")
StateWire = io.Custom("MF_STATE")
SettingsWire = io.Custom("MF_SETTINGS")

ORIGIN = "mutual_forcing_origin"
"""Key in LATENT dicts under which a chunk's place in its stream travels."""


@dataclass(frozen=True)
class StreamPlan:
    """What the artist decides before a stream begins; sizes in pixels, window in seconds."""

    width: int
    height: int
    window: int
    seed: int
    start: Start | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < SPACE_STRIDE or value % SPACE_STRIDE:
                lower = max(SPACE_STRIDE, value - value % SPACE_STRIDE)
                raise ValueError(
                    f"the {name} is {value} pixels, which can't be made: use a multiple of "
                    f"{SPACE_STRIDE}, for instance {lower} or {lower + SPACE_STRIDE}"
                )
        if self.window < 1:
            raise ValueError(f"the memory is {self.window} seconds, expected at least 1")
        if self.start is not None:
            rows, columns = self.start.grid
            if (rows, columns) != (self.height // SPACE_STRIDE, self.width // SPACE_STRIDE):
                raise ValueError(
                    f"the start image is {columns * SPACE_STRIDE} x {rows * SPACE_STRIDE} and the "
                    "stream "
                    f"{self.width} x {self.height}: give both the same size"
                )

    def begin(self, model: StreamModel) -> StreamState:
        """The state before the first block of a stream of this model."""
        settings = StreamSettings(
            self.height // SPACE_STRIDE, self.width // SPACE_STRIDE, self.window, (self.seed,)
        )
        return new_stream(model, settings)


def default_plan(model: StreamModel) -> StreamPlan:
    """What a stream is when Stream Settings is not connected: the model's own size, and seed 0."""
    usual = model.defaults
    return StreamPlan(usual.width * SPACE_STRIDE, usual.height * SPACE_STRIDE, usual.window, seed=0)
