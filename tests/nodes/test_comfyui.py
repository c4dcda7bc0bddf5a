"""The pack in a real ComfyUI, queued over its API. Skipped where there is none.

A tiny random model stands in for the shipped one: what is tested is the way, not the picture.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mutual_forcing.samplers.schedule import written
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import (
    LIVE,
    cached_nodes,
    endings,
    frames_of,
    inputs_of,
    lengths,
    prompt_of,
    refusal,
    run_from_page,
    same,
    titled,
)
from mutual_forcing.tests.comfyui_server import PACK, ROOT, Server, comfyui_path, comfyui_python
from mutual_forcing.tests.tiny import TRANSFORMER, save_tiny
from mutual_forcing.tests.ui_workflow import api_prompt, read_workflow
from PIL import Image

pytestmark = pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI found")
# Those of LTX-2 have a file of their own.
WORKFLOWS = sorted(
    path for path in (ROOT / "example_workflows").glob("*.json") if "_ltx2_" not in path.name
)

OLD = sorted(
    path
    for path in (ROOT / "tests" / "data" / "workflows_v1").glob("*.api.json")
    if "_ltx2_" not in path.name
)


@pytest.fixture(scope="module")
def ours(schemas: dict) -> dict:
    """The schemas of our nodes."""
    return {name: schema for name, schema in schemas.items() if name.startswith("MF_")}


def options_of(schema: dict) -> Iterator[tuple[str, dict]]:
    """Names and options of a node's inputs."""
    for section in ("required", "optional"):
        for name, (_, options) in schema["input"].get(section, {}).items():
            yield name, options


# What an artist sees of the nodes.


def test_all_nodes_are_there_and_not_too_many(ours: dict) -> None:
    assert set(ours) >= {"MF_LoadModel", "MF_StreamSettings", "MF_SampleChunk", "MF_Decode"}
    assert len(ours) <= 14


def test_every_node_explains_itself(ours: dict) -> None:
    for name, schema in ours.items():
        assert schema["category"].startswith("MutualForcing/"), name
        assert schema["description"] and schema["search_aliases"], name
        assert schema["display_name"] and "MF_" not in schema["display_name"], name
        assert all(schema["output_tooltips"]), name
        for entry, options in options_of(schema):
            assert options.get("tooltip"), f"{name}.{entry}"


def test_takes_come_by_the_queue(ours: dict) -> None:
    for name in ("MF_GenerateClip", "MF_SampleChunk"):
        assert dict(options_of(ours[name]))["variation"]["control_after_generate"]


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(
    server: Server, ours: dict
) -> None:
    for name, schema in ours.items():
        page = server.text(f"/extensions/{PACK}/docs/{name}.md")
        names = list(schema["output_name"])
        for entry, options in options_of(schema):
            names.append(options.get("display_name", entry))
            for option in options.get("options") or []:
                if isinstance(option, dict):
                    names += option["inputs"].get("required", {})
        missing = [entry for entry in names if f"| {entry} |" not in page]
        assert not missing, f"{name}: {missing}"


def test_every_node_and_input_has_its_chinese_words_and_none_is_left_over(
    server: Server, ours: dict
) -> None:
    """English is the schema itself, which the page falls back to."""
    chinese = server.get("/i18n")["zh"]
    words = chinese["nodeDefs"]
    assert {name for name in words if name.startswith("MF_")} == set(ours)
    for name, schema in ours.items():
        node, inputs = words[name], set()
        for entry, options in options_of(schema):
            inputs.add(entry)
            for option in options.get("options") or []:
                if isinstance(option, dict):
                    inputs |= {f"{entry}_{key}" for key in option["inputs"].get("required", {})}
        assert set(node["inputs"]) == inputs, name
        assert list(node["outputs"]) == [str(slot) for slot in range(len(schema["output"]))], name
        texts = [node["display_name"], node["description"]]
        for entry in (*node["inputs"].values(), *node["outputs"].values()):
            texts += entry["name"], entry["tooltip"]
        # vue-i18n, which the page reads them with, has a meaning of its own for these.
        assert all(text and not set(text) & set("{}@|") for text in texts), name
    assert {"MF_STATE", "MF_SETTINGS"} <= set(chinese["dataTypes"])


def test_templates_are_offered(server: Server) -> None:
    assert set(server.get("/workflow_templates")[PACK]) >= {path.stem for path in WORKFLOWS}


# The workflows.


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_and_its_clips_have_picture_and_sound_of_one_length(
    path: Path, server: Server, schemas: dict
) -> None:
    saved = server.saved(server.run(api_prompt(read_workflow(path), schemas)))
    assert saved
    for clip in saved:
        video, audio = lengths(clip)
        assert abs(video - audio) <= Fraction(1, 24), (
            f"{clip.name}: {float(video)} s, {float(audio)} s"
        )
        assert video >= 5


def test_both_endings_share_their_past_and_end_differently(server: Server, schemas: dict) -> None:
    _, (first, second) = endings(server, prompt_of("2_chunks_and_a_fork.json", schemas), "fork")
    alike = [same(*blocks) for blocks in zip(first.latents, second.latents, strict=True)]
    assert alike == [True] * 5 + [False] * 2


def test_changing_the_last_chunk_runs_only_that_one_and_gives_what_a_fresh_run_gives(
    server: Server, schemas: dict
) -> None:
    """States in ComfyUI's cache are handed out again and again; none may have been written into."""
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, before = endings(server, prompt, "before")
    inputs_of(prompt, "MF_SampleChunk")[-1]["variation"] = 5
    entry, again = endings(server, prompt, "again")
    chunks = [node for node, one in prompt.items() if one["class_type"] == "MF_SampleChunk"]
    assert [chunk in cached_nodes(entry) for chunk in chunks] == [True, True, True, False]
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    entry, fresh = endings(server, prompt, "fresh")
    assert cached_nodes(entry) == []
    for ours, theirs in zip(again, fresh, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))
    assert not same(before[1].latents[-1], fresh[1].latents[-1])


def test_how_the_work_is_carried_out_does_not_change_the_stream(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, expected = endings(server, prompt, "eager")
    for chunk in inputs_of(prompt, "MF_SampleChunk"):
        chunk["execution"] = "streams"
    _, found = endings(server, prompt, "streams")
    for ours, theirs in zip(found, expected, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))
    inputs_of(prompt, "MF_SampleChunk")[0]["execution"] = "graph"
    assert "graphs are CUDA" in refusal(server, prompt)


# Stopping, and going on.


def test_cancelling_keeps_what_was_finished(server: Server, schemas: dict) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    inputs_of(prompt, "MF_GenerateClip")[0] |= {
        "seconds": 300,
        "mode": "few steps",
        "mode.steps": 8,
    }
    kept = server.output / "mutual_forcing"
    before = set(kept.glob("unfinished_*"))
    temp = server.base / "temp"
    earlier = set(temp.glob("mutual_forcing_*.mp4"))
    queued = server.queue(prompt)
    end = time.monotonic() + 300
    while not any(
        file.stat().st_size > 100_000 for file in {*temp.glob("mutual_forcing_*.mp4")} - earlier
    ):
        assert time.monotonic() < end, "no block was finished in five minutes"
        time.sleep(0.1)
    pressed = time.monotonic()
    server.post("/interrupt")
    entry = server.finished(queued)
    # The tiny model takes milliseconds a step; the rest is writing files, on a machine that may be
    # busy.
    assert time.monotonic() - pressed < 20
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    files = {file.suffix: file for file in set(kept.glob("unfinished_*")) - before}
    assert files[".mp4"].stem == files[".safetensors"].stem
    state = load_state(files[".safetensors"])
    assert 1 < state.next_block < 301
    assert len(frames_of(files[".mp4"])) == 1 + 24 * (state.next_block - 1)
    with av.open(files[".mp4"]) as file:
        notes = dict(file.metadata)
    assert json.loads(notes["prompt"]) == prompt
    assert json.loads(notes["mutual_forcing_model"])["title"] == "tiny random model"
    video, audio = lengths(files[".mp4"])
    assert abs(video - audio) <= Fraction(1, 24)
    assert str(files[".mp4"]) in server.log.read_text(errors="replace")
    (run,) = [one for one in server.get("/mutual_forcing/live") if one["prompt_id"] == queued]
    assert run["over"] and any(files[".mp4"].name in words for words in run["words"])
    # Those of earlier runs go when nothing holds them any more.
    assert set(temp.glob("mutual_forcing_*.mp4")) <= earlier


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what a process has mapped")
def test_what_a_long_stream_does_not_need_waits_on_disk(server: Server, schemas: dict) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    asked = {"seconds": 40, "mode": "few steps", "mode.steps": 1}
    inputs_of(prompt, "MF_GenerateClip")[0] |= asked
    entry = server.finished(server.queue(prompt))
    assert entry["status"]["status_str"] == "success"
    # ComfyUI keeps the state that the node gave; what it does not need has no name any more.
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/.latents-" in maps and not list((server.base / "temp").glob(".latents-*"))


def test_a_saved_stream_goes_on_as_if_it_had_never_stopped(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, direct = endings(server, prompt, "direct")
    name = next(
        file.name for file in sorted((server.output / "mutual_forcing").glob("after_chunk_2*"))
    )
    prompt["90"] = {"class_type": "MF_LoadState", "inputs": {"file": name}}
    for chunk in inputs_of(prompt, "MF_SampleChunk")[2:]:
        chunk["state"] = ["90", 0]
    _, resumed = endings(server, prompt, "resumed")
    for ours, theirs in zip(direct, resumed, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))


# The clip is the file that was written.


def encoded_by(path: Path) -> bytes:
    """What x264 wrote into a file about itself."""
    with av.open(path) as file:
        return bytes(next(file.demux(video=0)))


def test_the_clip_is_a_file_that_is_saved_as_it_is_and_pictures_are_made_where_they_are_wanted(
    server: Server, schemas: dict
) -> None:
    """Made longer, or wanted as pictures too, nothing is sampled that was there already."""
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"]
    prompt[key]["inputs"] |= {"seconds": 3, "variation": 77}
    said = len(server.log.read_text(errors="replace"))
    (short,) = server.saved(server.run(prompt))
    assert b"crf=18.0" in encoded_by(short)  # as the writer does, and core does not
    prompt[key]["inputs"]["seconds"] = 5
    (long,) = server.saved(server.run(prompt))
    assert np.array_equal(frames_of(long)[:73], frames_of(short))
    prompt |= {
        "80": {
            "class_type": "CreateVideo",
            "inputs": {"images": [key, 1], "audio": [key, 2], "fps": 24.0},
        },
        "81": {
            "class_type": "SaveVideo",
            "inputs": {
                "video": ["80", 0],
                "filename_prefix": "video/pictures",
                "format": "mp4",
                "format.codec": "h264",
            },
        },
    }
    again = sorted(server.saved(server.run(prompt)))[-1]
    assert lengths(again) == lengths(long)
    log = server.log.read_text(errors="replace")[said:]
    assert "4 of 6 blocks were there already" in log and "6 of 6 blocks were there" in log


def test_a_clip_goes_on_in_takes_to_a_given_sound_and_is_one_video_again(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    ((key, clip),) = [
        (key, node) for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"
    ]
    (saving,) = inputs_of(prompt, "SaveVideo")
    model, (settings,) = clip["inputs"]["model"], inputs_of(prompt, "MF_StreamSettings")
    clip["inputs"]["seconds"] = 3
    settings["takes"] = 2
    both = {"model": model, "video": [key, 0], "settings": clip["inputs"]["settings"]}
    sound = {"audio": [key, 2], "vae": [model[0], 3]}
    on = {name: clip["inputs"][name] for name in ("model", "positive", "mode")}
    prompt |= {
        "80": {"class_type": "MF_StreamFromClip", "inputs": both | {"seconds": 2}},
        "81": {"class_type": "VAEEncodeAudio", "inputs": sound},
        "82": {
            "class_type": "MF_GenerateClip",
            "inputs": on | {"state": ["80", 0], "given": ["81", 0], "seconds": 2, "variation": 0},
        },
        "83": {"class_type": "MF_Rewind", "inputs": {"state": ["82", 4], "second": 3, "take": 2}},
        "84": {
            "class_type": "MF_Decode",
            "inputs": {"vae": model, "state": ["83", 0], "part": "whole stream", "overlap": 3}
            | {"last": False},
        },
        "85": {
            "class_type": "MF_Decode",
            "inputs": {"vae": model, "state": ["83", 0], "part": "span", "overlap": 3}
            | {"last": False, "begin": 1, "end": 2},
        },
    }
    for number, name in ((82, "takes"), (84, "whole"), (85, "span")):
        slot = 0 if number == 82 else 3
        inputs = saving | {"video": [str(number), slot], "filename_prefix": f"video/{name}"}
        prompt[f"s{number}"] = {"class_type": "SaveVideo", "inputs": inputs}
    saved = {path.name.split("_")[0]: path for path in server.saved(server.run(prompt))}
    takes, whole, span = (frames_of(saved[name]).astype(int) for name in ("takes", "whole", "span"))
    assert takes.shape == (48, 64, 128, 3)  # two seconds more, side by side
    assert whole.shape == (73, 64, 64, 3) and span.shape == (24, 64, 64, 3)
    # The second take's first new second, wherever it is decoded, but for what H.264 leaves of it.
    second, first = (np.abs(takes[:24, :, at : at + 64] - whole[49:]).mean() for at in (64, 0))
    assert 2 * second < first
    assert np.abs(span - whole[25:49]).mean() < 2 * second


def test_given_pictures_that_end_early_or_do_not_fit_are_said(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"]
    (saving,) = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    first = prompt[key]["inputs"]
    model = first["model"]
    first["seconds"] = 2
    again = first | {"given": ["80", 0], "seconds": 4}
    prompt |= {
        "80": {"class_type": "VAEEncode", "inputs": {"pixels": [key, 1], "vae": [model[0], 2]}},
        "81": {"class_type": "MF_GenerateClip", "inputs": again},
    }
    prompt[saving]["inputs"]["video"] = ["81", 0]
    answer = server.post("/prompt", {"prompt": prompt})
    server.finished(answer["prompt_id"])
    runs = server.get(LIVE)
    words = "\n".join(word for run in runs if run["node_id"] == "81" for word in run["words"])
    assert "is given is followed up to second 2 of 4 (pictures need 24 for each second" in words

    sound = {"audio": [key, 2], "vae": [model[0], 3]}
    both = {"video_latent": ["80", 0], "audio_latent": ["83", 0]}
    prompt["83"] = {"class_type": "VAEEncodeAudio", "inputs": sound}
    prompt["84"] = {"class_type": "LTXVConcatAVLatent", "inputs": both}
    large = {"image": [key, 1], "upscale_method": "area", "width": 96, "height": 96}
    prompt["85"] = {"class_type": "ImageScale", "inputs": large | {"crop": "disabled"}}
    encoded = {"pixels": ["85", 0], "vae": [model[0], 2]}
    prompt["86"] = {"class_type": "VAEEncode", "inputs": encoded}
    for given, said in (("84", "holds pictures and sound"), ("86", "are 96 x 96 pixels, and the")):
        prompt["81"]["inputs"]["given"] = [given, 0]
        assert said in refusal(server, prompt)


def test_a_clip_is_plotted_alike_from_its_file_and_from_frames_and_sound(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"]
    prompt[key]["inputs"]["seconds"] = 3
    del prompt[next(key for key, node in prompt.items() if node["class_type"] == "SaveVideo")]
    apart = {"images": [key, 1], "audio": [key, 2]}
    part = {"video": [key, 0], "start_time": 1.0, "duration": 1.0, "strict_duration": False}
    together = {"images": [key, 1], "audio": [key, 2], "fps": 24.0, "bit_depth": 8}
    prompt["80"] = {"class_type": "Video Slice", "inputs": part}
    prompt["81"] = {"class_type": "CreateVideo", "inputs": together}
    wires = apart, {"video": ["81", 0]}, {"video": [key, 0]}, {"video": ["80", 0]}
    for number, inputs in enumerate(wires):
        plot = {"class_type": "MF_PlotClip", "inputs": {"fps": 24.0, "period": 1.0} | inputs}
        save = {"images": [f"p{number}", 0], "filename_prefix": f"plot{number}"}
        prompt[f"p{number}"] = plot
        prompt[f"s{number}"] = {"class_type": "SaveImage", "inputs": save}
    frames, video, file, second = (
        np.array(Image.open(path)).astype(int)
        for path in sorted(server.saved(server.run(deepcopy(prompt))))
    )
    assert (frames != 255).mean() > 0.1 and np.array_equal(frames, video)
    # The first of the frames on top, but for what H.264 leaves of it; a slice begins with another.
    first = (one[20:130, 70:180].ravel() for one in (file, frames, second))
    alike = np.corrcoef(np.stack(list(first)))[0]
    assert alike[1] > 0.5 > 2 * abs(alike[2])
    for inputs, said in (
        ({}, "neither is connected"),
        (apart | {"video": [key, 0]}, "both are connected"),
        ({"video": [key, 0], "audio": [key, 2]}, "a video has its own sound"),
    ):
        wrong = {k: v for k, v in prompt.items() if k[0] not in "ps8"}
        wrong["p"] = plot | {"inputs": {"fps": 24.0, "period": 1.0} | inputs}
        wrong["s"] = {"class_type": "PreviewImage", "inputs": {"images": ["p", 0]}}
        assert said in refusal(server, wrong)


def test_limits_hold_over_a_wire_and_what_cannot_fit_is_refused_at_once(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"]
    prompt["90"] = {"class_type": "PrimitiveInt", "inputs": {"value": 100_000}}
    inputs = prompt[key]["inputs"]
    inputs["seconds"] = ["90", 0]
    assert "'length (seconds)' is 100000, expected 0 to 3600" in refusal(server, prompt)
    prompt["90"]["inputs"]["value"] = 3600
    prompt["91"] = {"class_type": "PreviewImage", "inputs": {"images": [key, 1]}}
    size = inputs_of(prompt, "MF_StreamSettings")[0]
    size |= {"width": 4096, "height": 4096}
    assert "GB are free: disconnect 'images'" in refusal(server, prompt)
    size["width"] = 8192
    assert "'width' is 8192, expected 0 to 4096" in refusal(server, prompt)
    prompt["92"] = {"class_type": "PrimitiveString", "inputs": {"value": "no steps"}}
    size["width"], inputs["mode"] = 64, ["92", 0]
    assert "'mode' is 'no steps', expected one of: automatic, " in refusal(server, prompt)


# What an artist reads when something is wrong.


@pytest.mark.parametrize(
    ("node", "change", "said"),
    [
        ("MF_StreamSettings", {"width": 70}, "multiple of 32"),
        ("MF_LoadModel", {"file": "gone.safetensors"}, "is not there"),
        ("CLIPTextEncode", {"text": ""}, "the prompt is empty"),
        ("CLIPTextEncode", {"text": "zebra"}, "has no word that this model knows"),
    ],
)
def test_mistakes_are_named_with_a_next_step(
    node: str, change: dict, said: str, server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    inputs_of(prompt, node)[0].update(change)
    assert said in refusal(server, prompt)


def test_a_template_without_its_files_says_where_they_are_published(
    server: Server, schemas: dict
) -> None:
    said = refusal(server, prompt_of("5_ltx2_text_to_clip.json", schemas))
    assert "https://huggingface.co/Exploration/omniforcing-ltx2-5s-causal into ComfyUI's" in said


def test_settings_and_state_together_are_refused(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    first, second = inputs_of(prompt, "MF_SampleChunk")[:2]
    second["settings"] = first["settings"]
    assert "disconnect 'settings'" in refusal(server, prompt)


def test_sound_and_picture_of_two_chunks_are_refused(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    one, other = inputs_of(prompt, "MF_Decode")
    one["audio"] = other["audio"]
    assert "two different chunks" in refusal(server, prompt)


def wrong_wires(prompt: dict, kind: str, **inputs: object) -> dict:
    """The forked workflow with other wires at its first node of a kind."""
    wrong = deepcopy(prompt)
    inputs_of(wrong, kind)[0].update(inputs)
    return wrong


def test_wrong_wires_are_named_in_one_sentence(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    decoding = inputs_of(prompt, "MF_Decode")[0]
    swapped = {"video": decoding["audio"], "audio": decoding["video"]}
    assert "not in their places" in refusal(server, wrong_wires(prompt, "MF_Decode", **swapped))
    swapped = {"vae": decoding["audio_vae"], "audio_vae": decoding["vae"]}
    said = refusal(server, wrong_wires(prompt, "MF_Decode", **swapped))
    assert "a VAE for sound is connected to 'vae'" in said
    latents = {"video_latent": decoding["video"], "audio_latent": decoding["audio"]}
    prompt |= {"80": {"class_type": "LTXVConcatAVLatent", "inputs": latents}}
    said = refusal(server, wrong_wires(prompt, "MF_Decode", video=["80", 0]))
    assert "put LTXV Separate AV Latent before it" in said
    text = inputs_of(prompt, "MF_SampleChunk")[0]["positive"]
    twice = {"conditioning_to": text, "conditioning_from": text}
    prompt |= {"81": {"class_type": "ConditioningConcat", "inputs": twice}}
    said = refusal(server, wrong_wires(prompt, "MF_SampleChunk", positive=["81", 0]))
    assert "without Conditioning (Concat)" in said


# Prompts with their times.


def test_prompts_from_any_node_are_one_schedule_and_make_the_stream_again(
    server: Server, schemas: dict
) -> None:
    prompt, loader, chunk = one_chunk(schemas)
    text = next(key for key, node in prompt.items() if node["class_type"] == "CLIPTextEncode")
    inputs = {
        "clip": [loader, 1],
        "lines": "0: red ball\n1.5 blend 1: bell",
        "past": "read again",
        "past.seconds": 2,
        "append": [text, 0],
        "start": 3.0,
    }
    prompt["50"] = {"class_type": "MF_PromptSchedule", "inputs": inputs}
    prompt[text]["inputs"]["text"] = "drum low"
    prompt[chunk]["inputs"] |= {"positive": ["50", 0], "seconds": 4}
    played = stream_of(server, prompt, chunk, "played")
    rows = "0: red ball\n1.5 blend 1: bell\n3 reread 2: drum low\n"
    assert written(played.schedule) == rows
    inputs |= {"lines": rows, "past": "keep"}
    for name in ("append", "past.seconds"):
        del inputs[name]
    assert equal(played, stream_of(server, prompt, chunk, "replayed"))
    # A second chunk goes on in the same schedule: two and then two seconds are four.
    prompt[chunk]["inputs"]["seconds"] = 2
    more = {"state": [chunk, 0], **prompt[chunk]["inputs"]}
    more.pop("settings", None)
    prompt["51"] = {"class_type": "MF_SampleChunk", "inputs": more}
    assert equal(played, stream_of(server, prompt, "51", "more"))
    for lines, message in {
        "0: red ball\n4 bell": "line 2 of the schedule is '4 bell'",
        "0: red ball\n4: xyzzy": "line 2 of the schedule: the prompt 'xyzzy' has no word",
        "1: red ball": "says nothing for second 0",
        "0: red ball\n4.1: bell\n4.2: drum": "the same block",
    }.items():
        inputs["lines"] = lines
        saving = {"state": [chunk, 0], "name": "refused", "memory": False}
        saved = prompt | {"99": {"class_type": "MF_SaveState", "inputs": saving}}
        assert message in refusal(server, saved)


# ComfyUI's own nodes around ours.


def one_chunk(schemas: dict) -> tuple[dict, str, str]:
    """A chunk of two seconds that is saved, its loader's id and its own."""
    whole = prompt_of("2_chunks_and_a_fork.json", schemas)
    (loader,) = [key for key, node in whole.items() if node["class_type"] == "MF_LoadModel"]
    chunk = next(key for key, node in whole.items() if node["class_type"] == "MF_SampleChunk")
    kept = {"MF_LoadModel", "MF_StreamSettings"}
    used = {chunk, whole[chunk]["inputs"]["positive"][0]}
    prompt = {k: node for k, node in whole.items() if k in used or node["class_type"] in kept}
    return prompt, loader, chunk


def stream_of(server: Server, prompt: dict, chunk: str, name: str) -> StreamState:
    """The state after a chunk."""
    saving = {"state": [chunk, 0], "name": name, "memory": False}
    server.run(prompt | {"99": {"class_type": "MF_SaveState", "inputs": saving}})
    return load_state(server.output / "mutual_forcing" / f"{name}_00001_.safetensors")


def equal(one: StreamState, other: StreamState) -> bool:
    return all(same(*blocks) for blocks in zip(one.latents, other.latents, strict=True))


def test_a_lora_changes_the_stream_and_is_undone_and_a_saved_model_has_it_in(
    server: Server, schemas: dict
) -> None:
    prompt, loader, chunk = one_chunk(schemas)
    before = stream_of(server, prompt, chunk, "plain")
    inputs = {"model": [loader, 0], "lora_name": "lora.safetensors", "strength_model": 1.0}
    changed = deepcopy(prompt) | {"80": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}
    changed[chunk]["inputs"]["model"] = ["80", 0]
    saving = {"model": ["80", 0], "filename_prefix": "merged"}
    changed["81"] = {"class_type": "ModelSave", "inputs": saving}
    with_lora = stream_of(server, changed, chunk, "lora")
    assert not equal(with_lora, before)
    again = deepcopy(prompt)
    again[chunk]["inputs"] |= {"mode": "few steps", "mode.steps": 4}  # as automatic, not cached
    assert equal(stream_of(server, again, chunk, "undone"), before)
    shutil.copy(
        server.output / "merged_00001_.safetensors", server.base / "models" / "mutual_forcing"
    )
    again[loader]["inputs"]["file"] = "merged_00001_.safetensors"
    merged = stream_of(server, again, chunk, "merged")
    assert equal(merged, with_lora) and merged.model_id != before.model_id


def test_core_nodes_encode_and_decode_with_our_vaes(server: Server, schemas: dict) -> None:
    """A start image in; both latents of a chunk, and of its own sound, out."""
    prompt, loader, chunk = one_chunk(schemas)
    plain = stream_of(server, prompt, chunk, "no_start")
    prompt |= {
        "80": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "81": {"class_type": "VAEEncode", "inputs": {"pixels": ["80", 0], "vae": [loader, 2]}},
        "82": {"class_type": "VAEDecode", "inputs": {"samples": [chunk, 1], "vae": [loader, 2]}},
        "83": {
            "class_type": "VAEDecodeAudio",
            "inputs": {"samples": [chunk, 2], "vae": [loader, 3]},
        },
        "84": {
            "class_type": "LTXVAudioVAEDecode",
            "inputs": {"samples": [chunk, 2], "audio_vae": [loader, 3]},
        },
        "85": {"class_type": "VAEEncodeAudio", "inputs": {"audio": ["84", 0], "vae": [loader, 3]}},
        "86": {
            "class_type": "VAEDecodeAudio",
            "inputs": {"samples": ["85", 0], "vae": [loader, 3]},
        },
    }
    decoding = {"vae": [loader, 0], "video": [chunk, 1], "audio": [chunk, 2]}
    decoding |= {"part": "this chunk", "overlap": 3, "last": True}
    prompt["87"] = {"class_type": "MF_Decode", "inputs": decoding}
    inputs_of(prompt, "MF_StreamSettings")[0]["start"] = ["81", 0]
    save = {"format": "mp4", "format.codec": "h264"}
    for name, images, audio in (("core", "82", "83"), ("again", "82", "86"), ("ours", "87", None)):
        sound = ["87", 1] if audio is None else [audio, 0]
        clip = {"images": [images, 0], "audio": sound, "fps": 24.0, "bit_depth": 8}
        prompt[f"v{name}"] = {"class_type": "CreateVideo", "inputs": clip}
        saving = {"video": [f"v{name}", 0], "filename_prefix": f"video/{name}"} | save
        prompt[f"s{name}"] = {"class_type": "SaveVideo", "inputs": saving}
    saving = {"state": [chunk, 0], "name": "with_start", "memory": False}
    prompt["99"] = {"class_type": "MF_SaveState", "inputs": saving}
    again, core, ours = sorted(server.saved(server.run(prompt)))
    assert np.array_equal(frames_of(core), frames_of(ours))
    assert lengths(core) == lengths(ours) == lengths(again)
    begun = load_state(server.output / "mutual_forcing" / "with_start_00001_.safetensors")
    assert not torch.equal(begun.latents[0].video, plain.latents[0].video)


def test_a_sampler_of_core_says_what_to_use_instead(server: Server, schemas: dict) -> None:
    prompt, loader, _ = one_chunk(schemas)
    (text,) = [key for key, node in prompt.items() if node["class_type"] == "CLIPTextEncode"]
    size = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    sampler = {"model": [loader, 0], "positive": [text, 0], "negative": [text, 0], "seed": 0}
    sampler |= {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    sampler |= {"latent_image": ["80", 0], "denoise": 1.0}
    prompt = {
        **{key: prompt[key] for key in (loader, text)},
        "80": {"class_type": "EmptyLTXVLatentVideo", "inputs": size},
        "81": {"class_type": "KSampler", "inputs": sampler},
        "82": {"class_type": "VAEDecode", "inputs": {"samples": ["81", 0], "vae": [loader, 2]}},
        "83": {"class_type": "PreviewImage", "inputs": {"images": ["82", 0]}},
    }
    assert "use Generate Clip or Sample Chunk" in refusal(server, prompt)


# Graphs of earlier versions.


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_graph_of_an_earlier_version_runs_as_it_was_saved(
    path: Path, server: Server, schemas: dict
) -> None:
    saved = server.saved(server.run(titled(json.loads(path.read_text(encoding="utf-8")), schemas)))
    assert saved
    for clip in saved:
        video, audio = lengths(clip)
        assert abs(video - audio) <= Fraction(1, 24) and video >= 6


# The seam.


@pytest.mark.parametrize("rank", [0, 2])
def test_what_our_loader_gives_is_the_engine_inside_comfyui(tmp_path: Path, rank: int) -> None:
    """See the script: bit for bit the engine's streams, LoRAs, offloading, saving, both codecs;
    with few-step adapters too, as the shipped model has them."""
    comfyui = comfyui_path()
    config = replace(TRANSFORMER, few_step_rank=rank)
    script = ROOT / "tests" / "inside_comfyui.py"
    model = save_tiny(tmp_path / "tiny.safetensors", transformer=config)
    command = [str(comfyui_python(comfyui)), str(script), str(comfyui), str(model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr


# The page.


@pytest.mark.page
def test_workflow_1_runs_from_the_web_page(server: Server, tmp_path: Path) -> None:
    """In Chromium, by the Run button."""
    said = run_from_page(server, WORKFLOWS[0], tmp_path / "page.png")
    assert "replaced: none" in said
    listed = re.search(r"templates: (.+)", said)[1].split(", ")
    every = (ROOT / "example_workflows").glob("*.json")
    assert listed == sorted(path.stem for path in every) and listed[0] == "1_text_to_clip"


@pytest.mark.page
def test_a_graph_of_an_earlier_version_opens_in_the_web_page(
    server: Server, tmp_path: Path
) -> None:
    """ComfyUI's own button puts today's nodes in place of those that are gone."""
    workflow = ROOT / "tests" / "data" / "workflows_v1" / "2_chunks_and_a_fork.json"
    said = run_from_page(server, workflow, tmp_path / "page.png")
    assert "replaced: MF_DecodeChunk, MF_DecodeChunk" in said
