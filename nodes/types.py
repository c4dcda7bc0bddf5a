"""The wires that are this pack's own, and what travels on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from comfy_api.latest import io

from ..host.stream_model import StreamModel
from ..networks.kept_keys import AS_COMPUTED, Kept
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.rollout import new_stream
from ..samplers.start import Start
from ..samplers.state import SEEDS_END, StreamSettings, StreamState

StateWire = io.Custom("MF_STATE")
SettingsWire = io.Custom("MF_SETTINGS")

ORIGIN = "mutual_forcing_origin"
"""Key in LATENT dicts under which a chunk's place in its stream travels."""


OWN_SIZE = 0
"""Width and height that stand for the model's own."""


@dataclass(frozen=True)
class StreamPlan:
    """What the artist decides before a stream begins; sizes in pixels, window in seconds, as many
    takes as there are clips: of the seed and those after it.
    """

    width: int = OWN_SIZE
    height: int = OWN_SIZE
    window: int | None = None
    seed: int = 0
    start: Start | None = field(default=None, repr=False)
    takes: int = 1
    kept: Kept = AS_COMPUTED

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < 0 or value % SPACE_STRIDE:
                lower = max(SPACE_STRIDE, value - value % SPACE_STRIDE)
                raise ValueError(
                    f"the {name} is {value} pixels, which can't be made: use a multiple of "
                    f"{SPACE_STRIDE}, for instance {lower} or {lower + SPACE_STRIDE}"
                )
        if self.window is not None and self.window < 1:
            raise ValueError(f"the memory is {self.window} seconds, expected at least 1")

    def begin(self, model: StreamModel) -> StreamState:
        """The state before the first block of a stream of this model.

        Raises:
            ValueError: a size that cannot be decoded, or a start image of another size or longer
                than the first block.
        """
        usual = model.about.defaults
        rows = self.height // SPACE_STRIDE or usual.height
        columns = self.width // SPACE_STRIDE or usual.width
        if self.start is not None and self.start.grid != (rows, columns):
            start_rows, start_columns = self.start.grid
            raise ValueError(
                f"the start image is {start_columns * SPACE_STRIDE} x {start_rows * SPACE_STRIDE} "
                f"and the stream {columns * SPACE_STRIDE} x {rows * SPACE_STRIDE}: give both the "
                "same size"
            )
        kind, block = model.about.kind, model.clock.layout.video_first
        if min(rows, columns) < kind.least:
            raise ValueError(
                f"the picture is {columns * SPACE_STRIDE} x {rows * SPACE_STRIDE}, and this "
                f"model's decoder needs at least {kind.least * SPACE_STRIDE} pixels each way"
            )
        if self.start is not None and self.start.latents.shape[2] > block:
            raise ValueError(
                f"the start has {self.start.latents.shape[2]} latents, and the first second of "
                f"this model's streams {block}: encode one picture, or connect a clip to 'given', "
                "or to Stream from Clip"
            )
        window = self.window or usual.window
        seeds = tuple((self.seed + take) % SEEDS_END for take in range(self.takes))
        return new_stream(model, StreamSettings(rows, columns, window, seeds, self.kept))
