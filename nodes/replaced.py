"""Nodes of earlier versions and what ComfyUI puts in their place when it opens a saved graph.

Before models were MODEL, CLIP and VAE, each kind had a decoding node of its own. The small model's
took the model: that wire becomes `vae`, which takes a MODEL too and then uses its own VAEs. All
other nodes kept their ids, and their new inputs are optional.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..samplers.overlap import OVERLAP


def _kept(*names: str) -> list[dict[str, str]]:
    return [{"new_id": name, "old_id": name} for name in names]


_OUTPUTS = [{"new_idx": slot, "old_idx": slot} for slot in range(3)]

REPLACED = [
    io.NodeReplace(
        new_node_id="MF_Decode",
        old_node_id="MF_DecodeChunk",
        old_widget_ids=["part"],
        input_mapping=[
            {"new_id": "vae", "old_id": "model"},
            *_kept("video", "audio", "part"),
            {"new_id": "overlap", "set_value": OVERLAP},
            {"new_id": "last", "set_value": False},
        ],
        output_mapping=_OUTPUTS,
    ),
    io.NodeReplace(
        new_node_id="MF_Decode",
        old_node_id="MF_DecodeLTX2",
        old_widget_ids=["part", "overlap", "last"],
        input_mapping=_kept("vae", "audio_vae", "video", "audio", "part", "overlap", "last"),
        output_mapping=_OUTPUTS,
    ),
]
