"""What travels on a MODEL or CONDITIONING wire and is not read here, so that a node can say so.

ComfyUI's nodes change a model by writing into its patcher, and a prompt by writing into its extras;
whoever does not look there passes over it in silence. A stream is sampled by this pack: it takes
weights with their patches (LoRAs), injections, the compute dtype and a kernel of attention from a
MODEL, and from CONDITIONING what `_READ` lists. Everything else is named. Imports nothing of
ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .conditioning import (
    REFUSAL,
    REMARKS,
    START,
    TEXT,
    TRANSCRIPT,
    TRANSITION,
    UNPROCESSED,
    Conditioning,
)

_READ_OBJECTS = {"manual_cast_dtype"}
_READ_OPTIONS = {"optimized_attention_override"}
# What the patcher itself calls, whoever samples.
_READ_CALLBACKS = {
    "on_clone",
    "on_deepclone_multigpu",
    "on_match_multigpu_clones",
    "on_load_after",
    "on_detach_after",
    "on_cleanup",
    "on_inject_model",
    "on_eject_model",
}
_READ = {REFUSAL, REMARKS, START, TEXT, TRANSCRIPT, TRANSITION, UNPROCESSED, "frame_rate"}
# LTX-2 itself does not look at it.
_READ |= {"pooled_output"}
# Values that change nothing.
_NEUTRAL = {
    "strength": 1.0,
    "mask_strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}
# Nodes that write what carries no name of theirs.
_NODES = {
    "rope_options": "ScaleROPE",
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
    "torch.compile": "TorchCompileModel",
    "torch_compile_kwargs": "TorchCompileModel",
    "context_handler": "Context Windows",
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "mask_strength": "Conditioning (Set Mask)",
    "set_area_to_bounds": "Conditioning (Set Mask)",
    "strength": "a strength of the prompt",
    "start_percent": "ConditioningSetTimestepRange",
    "end_percent": "ConditioningSetTimestepRange",
    "clip_start_percent": "a schedule of hooks",
    "clip_end_percent": "a schedule of hooks",
    "control": "a ControlNet",
    "control_apply_to_uncond": "a ControlNet",
    "hooks": "hooks",
    "keyframe_idxs": "LTXVAddGuide",
    "guide_attention_entries": "LTXVAddGuide",
    "generated_keyframes": "key frames",
    "ref_audio": "LTXVReferenceAudio",
    "concat_latent_image": "an image to inpaint",
    "concat_mask": "an image to inpaint",
    "gligen": "GLIGEN",
}


def unread(
    model: object, prompts: Mapping[str, Conditioning | None], *, guided: bool
) -> Iterator[str]:
    """Sentences about what does nothing on these wires.

    Args:
        model: a ModelPatcher.
        prompts: by the name of the wire.
        guided: whether there is guidance, without which no negative prompt is read.
    """
    found = {"model": _of_model(model)}
    for name, conditioning in prompts.items():
        found[name] = _of_prompt(conditioning or [])
        if name == "negative" and conditioning and not guided:
            found[name] = []
            yield "'negative' does nothing here: without guidance nothing leads away from a prompt"
    for name, things in found.items():
        if things := sorted(set(things)):
            yield f"does nothing here, on the wire to '{name}': {', '.join(things)}"


def _of_model(wire: object) -> list[str]:
    options = dict(getattr(wire, "model_options", {}))
    inner = dict(options.pop("transformer_options", {}))
    objects = getattr(wire, "object_patches", {})
    things = [
        *_entries({k: v for k, v in objects.items() if k not in _READ_OBJECTS}),
        *_entries({k: v for k, v in options.items() if k != "disable_cfg1_optimization"}),
        *_entries(getattr(wire, "additional_models", {})),
        *_entries({"hooks": getattr(wire, "hook_patches", None)}),
    ]
    for patches in inner.pop("patches", {}), inner.pop("patches_replace", {}):
        things += _entries(patches)
    for source in (getattr(wire, "wrappers", {}), inner.pop("wrappers", {})):
        things += [x for keyed in source.values() for x in _entries(keyed)]
    for source in (getattr(wire, "callbacks", {}), inner.pop("callbacks", {})):
        asked = (keyed for kind, keyed in source.items() if kind not in _READ_CALLBACKS)
        things += [x for keyed in asked for x in _entries(keyed)]
    return [*things, *_entries({k: v for k, v in inner.items() if k not in _READ_OPTIONS})]


def _of_prompt(conditioning: Conditioning) -> list[str]:
    return [
        _NODES.get(key, key)
        for _, extras in conditioning
        for key, value in extras.items()
        if key not in _READ and not _changes_nothing(key, value)
    ]


def _changes_nothing(key: str, value: object) -> bool:
    # A tensor has no truth of its own.
    empty = value is None or value is False or (isinstance(value, list | dict) and not value)
    return empty or (key in _NEUTRAL and value == _NEUTRAL[key])


def _entries(found: Mapping[object, object]) -> Iterator[str]:
    """What made each of these, or what it is called."""
    for key, value in found.items():
        if not _changes_nothing(str(key), value):
            yield _NODES.get(str(key)) or _maker(value) or str(key)


def _maker(value: object) -> str:
    """The node that wrote a function or an object: what is defined in a node is named by it."""
    values: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
    if isinstance(value, dict):
        values = value.values()
    for one in values:
        named = getattr(one, "__qualname__", None) or type(one).__qualname__
        if "<locals>" in named:
            return named.split(".")[0]
    return ""
