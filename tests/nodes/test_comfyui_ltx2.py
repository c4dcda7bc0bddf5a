"""LTX-2 in a real ComfyUI: its own nodes around ours, over files of all keys and tiny widths.

Skipped where there is no ComfyUI. The weights are random: what is tested is the way, and
the numbers against this pack's own network. Gemma is 16 numbers wide and otherwise whole
(`shrunken_gemma`).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import (
    LIVE,
    endings,
    frames_in,
    frames_of,
    inputs_of,
    lengths,
    prompt_of,
    refusal,
    run_from_page,
    run_named,
    same,
    titled,
)
from mutual_forcing.tests.comfyui_server import ROOT, Server, comfyui_path, comfyui_python
from mutual_forcing.tests.tiny import save_tiny
from mutual_forcing.tests.ui_workflow import read_workflow
from PIL import Image

pytestmark = pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI found")
WORKFLOWS = sorted(path.name for path in (ROOT / "example_workflows").glob("*_ltx2_*.json"))
OLD = sorted((ROOT / "tests" / "data" / "workflows_v1").glob("*_ltx2_*.api.json"))
BASE = "ltx-2-19b-dev-fp8.safetensors"
CONNECTORS = "ltx-2-19b-embeddings_connector_dev_bf16.safetensors"
WIDTH, HEIGHT = 96, 64


def in_comfyui(script: str, *arguments: Path) -> str:
    """Run a script of the tests in ComfyUI's own Python; what it printed."""
    comfyui = comfyui_path()
    command = [comfyui_python(comfyui), ROOT / "tests" / script, comfyui, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500)
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a shrunken LTX-2."""
    folder = tmp_path_factory.mktemp("ltx2") / "models"
    in_comfyui("shrunken_ltx2.py", folder)
    return folder


@pytest.fixture(scope="module")
def said(models: Path) -> str:
    """What the script of numbers printed; it leaves a model trained on films among the models."""
    return in_comfyui("inside_comfyui_ltx2.py", models)


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file."""
    folder = tmp_path_factory.mktemp("comfyui")

    def prepare(base: Path) -> None:
        shutil.copytree(models, base / "models", dirs_exist_ok=True)
        gemma = ROOT / "tests" / "shrunken_gemma"
        (base / "custom_nodes" / gemma.name).symlink_to(gemma, target_is_directory=True)
        noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(base / "input" / "example.png")

    model = save_tiny(folder / "tiny.safetensors")
    with Server(comfyui_path(), folder / "base", model, prepare) as running:
        yield running


@pytest.fixture(scope="module")
def schemas(server: Server) -> dict:
    """The schemas of all nodes."""
    return server.get("/object_info")


def shrunken(name: str, schemas: dict) -> dict:
    """A workflow of ours, as it is but for the size of its pictures and a minute's length."""
    return small(prompt_of(name, schemas))


def small(prompt: dict) -> dict:
    """A prompt with small pictures, of a few seconds."""
    for node in prompt.values():
        if node["inputs"].get("seconds", 0) > 7:
            node["inputs"]["seconds"] = 7
        if "width" in node["inputs"]:
            node["inputs"] |= {"width": WIDTH, "height": HEIGHT}
    return prompt


def text_to_clip(schemas: dict) -> dict:
    """Workflow 4 with a Sample Chunk for its button, in full precision and two blocks long."""
    prompt = shrunken("5_ltx2_text_to_clip.json", schemas)
    inputs_of(prompt, "MF_LoadLTX2")[0]["weights"] = "as in the file"
    chunk = prompt[node_of(prompt, "MF_GenerateClip")]
    chunk["class_type"] = "MF_SampleChunk"
    chunk["inputs"]["seconds"] = 2
    del chunk["inputs"]["vae"], chunk["inputs"]["audio_vae"]
    del prompt[node_of(prompt, "SaveVideo")]
    return prompt


def node_of(prompt: dict, kind: str) -> str:
    """The id of the one node of a type."""
    (found,) = [key for key, node in prompt.items() if node["class_type"] == kind]
    return found


def with_node(prompt: dict, key: str, kind: str, **inputs: object) -> dict:
    """The prompt with one more node."""
    return deepcopy(prompt) | {key: {"class_type": kind, "inputs": inputs}}


def made(server: Server, prompt: dict, name: str) -> StreamState:
    """The stream after the prompt's one chunk, or its one clip."""
    server.run(with_save(prompt, name))
    return load_state(server.output / "mutual_forcing" / f"{name}_00001_.safetensors")


def with_save(prompt: dict, name: str = "x") -> dict:
    """The prompt with an end, so that it can be queued."""
    kinds = {node["class_type"] for node in prompt.values()}
    chunk = "MF_SampleChunk" in kinds
    node = node_of(prompt, "MF_SampleChunk" if chunk else "MF_GenerateClip")
    saving = {"state": [node, 0 if chunk else 4], "name": name, "memory": False}
    return with_node(prompt, "99", "MF_SaveState", **saving)


def equal(one: StreamState, other: StreamState) -> bool:
    """Whether two streams are the same, bit for bit."""
    return all(same(*blocks) for blocks in zip(one.latents, other.latents, strict=True))


# The numbers.


def test_numbers_lora_and_eight_bits_inside_comfyui(said: str) -> None:
    """The script prints the measured differences, and fails where one is out of bounds."""
    numbers = dict(line.split() for line in said.splitlines() if len(line.split()) == 2)
    assert float(numbers["our_loader_vs_own_network"]) < 1e-4
    assert float(numbers["stock_loader_vs_own_network"]) < 1e-4
    assert float(numbers["taomate_vs_own_network"]) < 1e-4


@pytest.mark.parametrize("name", ["trained.safetensors", "omniforcing.safetensors"])
def test_a_model_that_was_trained_on_films_makes_a_clip(
    name: str, said: str, models: Path, server: Server, schemas: dict
) -> None:
    """The script makes films, their latents by LTX-2's encoders, trains both stages of Mutual
    Forcing and the three of OmniForcing on them, is killed on the way, and insists on the same
    bytes."""
    folder = server.base / "models" / "diffusion_models"
    shutil.copyfile(models / "diffusion_models" / name, folder / name)
    prompt = shrunken("5_ltx2_text_to_clip.json", schemas)
    loader, button = node_of(prompt, "MF_LoadLTX2"), node_of(prompt, "MF_GenerateClip")
    prompt[loader]["inputs"] |= {"file": name, "weights": "as in the file"}
    prompt[button]["inputs"] |= {"seconds": 2}
    (clip,) = server.saved(server.run(prompt))
    trained = frames_of(clip)
    assert trained.shape == (49, HEIGHT, WIDTH, 3) and trained.std() > 5


# The workflows.


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs_and_its_clips_have_picture_and_sound(
    name: str, server: Server, schemas: dict
) -> None:
    saved = server.saved(server.run(shrunken(name, schemas)))
    assert saved
    for clip in saved:
        video, audio = lengths(clip)
        assert abs(video - audio) <= Fraction(1, 24), f"{clip.name}: {video} s, {audio} s"
        assert video >= 1
        assert frames_of(clip).shape[1:] == (HEIGHT, WIDTH, 3)


@pytest.mark.page
def test_workflow_4_runs_from_the_web_page(server: Server, tmp_path: Path) -> None:
    """In Chromium, by the Run button."""
    workflow = read_workflow(ROOT / "example_workflows" / "5_ltx2_text_to_clip.json")
    (settings,) = [node for node in workflow["nodes"] if node["type"] == "MF_StreamSettings"]
    settings["widgets_values"][:2] = WIDTH, HEIGHT
    path = tmp_path / "small.json"
    path.write_text(json.dumps(workflow), encoding="utf-8")
    run_from_page(server, path, tmp_path / "page.png")


def test_both_endings_share_their_past_and_a_saved_one_goes_on_as_if_never_stopped(
    server: Server, schemas: dict
) -> None:
    prompt = shrunken("7_ltx2_chunks_and_a_fork.json", schemas)
    inputs_of(prompt, "MF_SaveState")[0]["name"] = "kept"
    _, (first, second) = endings(server, prompt, "fork")
    alike = [same(*blocks) for blocks in zip(first.latents, second.latents, strict=True)]
    assert alike == [True] * 4 + [False] * 2
    prompt["90"] = {"class_type": "MF_LoadState", "inputs": {"file": "kept_00001_.safetensors"}}
    for chunk in inputs_of(prompt, "MF_SampleChunk")[2:]:
        chunk["state"] = ["90", 0]
    _, resumed = endings(server, prompt, "resumed")
    assert equal(first, resumed[0]) and equal(second, resumed[1])


def test_chunks_decoded_one_after_the_other_are_as_long_as_the_stream(
    server: Server, schemas: dict
) -> None:
    prompt = shrunken("7_ltx2_chunks_and_a_fork.json", schemas)
    chunks = [key for key, node in prompt.items() if node["class_type"] == "MF_SampleChunk"][:3]
    wires = {name: inputs_of(prompt, "MF_Decode")[0][name] for name in ("vae", "audio_vae")}
    for index, chunk in enumerate(chunks):
        inputs = wires | {"video": [chunk, 1], "audio": [chunk, 2]}
        inputs |= {"part": "this chunk", "overlap": 2, "last": index == 2}
        prompt |= with_node({}, f"d{index}", "MF_Decode", **inputs)
        clip = {"images": [f"d{index}", 0], "audio": [f"d{index}", 1], "fps": [f"d{index}", 2]}
        prompt |= with_node({}, f"v{index}", "CreateVideo", bit_depth=8, **clip)
        save = {"filename_prefix": f"video/piece{index}", "format": "mp4", "format.codec": "h264"}
        prompt |= with_node({}, f"s{index}", "SaveVideo", video=[f"v{index}", 0], **save)
    saved = {path.name[:6]: path for path in server.saved(server.run(prompt))}
    pieces = [len(frames_of(saved[f"piece{index}"])) for index in range(3)]
    assert pieces == [33, 48, 64]  # 7, 6 and 6 latents, two of each held back until the next
    assert sum(pieces) == 25 + 5 * 24


def test_a_clip_is_what_core_decodes_of_the_same_stream(server: Server, schemas: dict) -> None:
    """LTX-2's VAEs look ahead: Generate Clip decodes when everything is there."""
    prompt = shrunken("5_ltx2_text_to_clip.json", schemas)
    loader, button = node_of(prompt, "MF_LoadLTX2"), node_of(prompt, "MF_GenerateClip")
    prompt[loader]["inputs"]["weights"] = "as in the file"
    prompt[button]["inputs"]["seconds"] = 2
    clip = {"images": [button, 1], "audio": [button, 2], "fps": 24.0, "bit_depth": 8}
    again = {"filename_prefix": "video/button", "video": ["79", 0]}
    inputs_of(prompt, "SaveVideo")[0].update(again)
    prompt = with_node(prompt, "79", "CreateVideo", **clip)
    chunk = {k: v for k, v in prompt[button]["inputs"].items() if k not in ("vae", "audio_vae")}
    prompt = with_node(prompt, "80", "MF_SampleChunk", **chunk)
    prompt = with_node(prompt, "81", "VAEDecode", samples=["80", 1], vae=[loader, 1])
    sound = {"samples": ["80", 2], "audio_vae": [loader, 2]}
    prompt = with_node(prompt, "82", "LTXVAudioVAEDecode", **sound)
    clip = {"images": ["81", 0], "audio": ["82", 0], "fps": 24.0, "bit_depth": 8}
    prompt = with_node(prompt, "83", "CreateVideo", **clip)
    save = {"filename_prefix": "video/core", "format": "auto", "codec": "auto"}
    save = inputs_of(prompt, "SaveVideo")[0] | save | {"video": ["83", 0]}
    prompt = with_node(prompt, "84", "SaveVideo", **save)
    ours, cores = sorted(server.saved(server.run(prompt)))
    assert frames_of(ours).shape == (49, HEIGHT, WIDTH, 3)
    assert np.array_equal(frames_of(ours), frames_of(cores))


@pytest.mark.parametrize(
    ("node", "is_tiny"), [("MF_GenerateClip", True), ("MF_SampleChunk", False)]
)
def test_a_page_plays_the_clip_with_its_sound_while_it_is_made(
    server: Server, schemas: dict, node: str, is_tiny: bool
) -> None:
    """Its decoders look ahead, so a second late; with a tiny one for pictures a third of one."""
    tiny = server.base / "models" / "vae_approx" / "taeltx_2.safetensors"
    hidden = tiny.with_suffix(".hidden")
    if not is_tiny:
        tiny.rename(hidden)
    prompt = shrunken("5_ltx2_text_to_clip.json", schemas)
    if node == "MF_SampleChunk":
        prompt = with_save(text_to_clip(schemas), "played")
    inputs = inputs_of(prompt, node)[0]
    inputs |= {"seconds": 3, "variation": 60}
    got = io.BytesIO()
    try:
        with server.page("a-page") as page:
            queued = server.queue(prompt, page)
            run = run_named(server, queued)
            place = f"{server.url}{LIVE}/{queued}/{run['node_id']}/clip.mp4"
            with urllib.request.urlopen(place, timeout=60) as answer:
                late = []
                while piece := answer.read1(1 << 16):
                    got.write(piece)
                    now = run_named(server, queued)
                    if not now["over"]:
                        late.append(now["made"] - frames_in(got.getvalue()) / 24)
            entry = server.finished(queued)
    finally:
        if hidden.exists():
            hidden.rename(tiny)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert run["plays"] and run["preview"] == (node == "MF_GenerateClip")
    assert min(late) <= (1 / 3 if is_tiny else 1.0) + 0.25  # and a fragment
    frames, made = frames_of(io.BytesIO(got.getvalue())), run_named(server, queued)["made"]
    pictures, sound = lengths(io.BytesIO(got.getvalue()))
    assert len(frames) == round(24 * made) and abs(pictures - sound) <= Fraction(1, 24)
    whole = io.BytesIO(urllib.request.urlopen(place, timeout=60).read())
    if node == "MF_SampleChunk":  # it writes no other clip
        assert whole.getvalue() == got.getvalue()
        return
    # What is handed on is decoded with all that the decoder sees, and nothing else.
    (saved,) = server.saved(entry)
    assert np.array_equal(frames_of(whole), frames_of(saved))
    assert frames.shape == frames_of(saved).shape
    assert np.abs(frames.astype(int) - frames_of(saved)).mean() > 10


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_graph_of_an_earlier_version_runs_as_it_was_saved(
    path: Path, server: Server, schemas: dict
) -> None:
    prompt = small(titled(json.loads(path.read_text(encoding="utf-8")), schemas))
    saved = server.saved(server.run(prompt))
    assert saved and all(frames_of(clip).shape[1:] == (HEIGHT, WIDTH, 3) for clip in saved)


# Core's nodes around ours.


def test_a_lora_changes_the_stream_and_is_undone_when_it_is_taken_out(
    server: Server, schemas: dict
) -> None:
    plain = text_to_clip(schemas)
    loader, chunk = node_of(plain, "MF_LoadLTX2"), node_of(plain, "MF_SampleChunk")
    before = made(server, plain, "plain")
    inputs = {"model": [loader, 0], "lora_name": "lora.safetensors", "strength_model": 1.0}
    changed = with_node(plain, "80", "LoraLoaderModelOnly", **inputs)
    changed[chunk]["inputs"]["model"] = ["80", 0]
    assert not equal(made(server, changed, "lora"), before)
    again = deepcopy(plain)
    again[chunk]["inputs"]["mode"] = "few steps"
    again[chunk]["inputs"]["mode.steps"] = 4  # the same as automatic, and not in ComfyUI's cache
    assert equal(made(server, again, "again"), before)


def test_core_loaders_model_may_be_wired_straight_in(server: Server, schemas: dict) -> None:
    prompt = text_to_clip(schemas)
    stock = {"unet_name": "stock.safetensors", "weight_dtype": "default"}
    prompt = with_node(prompt, "80", "UNETLoader", **stock)
    prompt[node_of(prompt, "MF_SampleChunk")]["inputs"]["model"] = ["80", 0]
    assert made(server, prompt, "stock").next_block == 2


def test_other_frame_rates_come_from_ltxvconditioning(server: Server, schemas: dict) -> None:
    prompt = text_to_clip(schemas)
    text, chunk = node_of(prompt, "CLIPTextEncode"), node_of(prompt, "MF_SampleChunk")
    wires = {"positive": [text, 0], "negative": [text, 0], "frame_rate": 25.0}
    prompt = with_node(prompt, "80", "LTXVConditioning", **wires)
    prompt[chunk]["inputs"]["positive"] = ["80", 0]
    state = made(server, prompt, "rate25")
    assert (state.layout.audio_first, state.layout.audio_next) == (25, 24)
    prompt["80"]["inputs"]["frame_rate"] = 23.0
    assert "use one of" in refusal(server, with_save(prompt))


def test_latents_go_through_cores_nodes_and_back(server: Server, schemas: dict) -> None:
    """Joined, separated, enlarged by the upsampler, and decoded by core and by us."""
    prompt = text_to_clip(schemas)
    loader, chunk = node_of(prompt, "MF_LoadLTX2"), node_of(prompt, "MF_SampleChunk")
    sound = loader
    for key, kind, inputs in (
        ("80", "LTXVConcatAVLatent", {"video_latent": [chunk, 1], "audio_latent": [chunk, 2]}),
        ("81", "LTXVSeparateAVLatent", {"av_latent": ["80", 0]}),
        ("82", "LatentUpscaleModelLoader", {"model_name": "upsampler.safetensors"}),
        (
            "83",
            "LTXVLatentUpsampler",
            {"samples": ["81", 0], "upscale_model": ["82", 0], "vae": [loader, 1]},
        ),
        ("84", "VAEDecode", {"samples": ["83", 0], "vae": [loader, 1]}),
        ("85", "LTXVAudioVAEDecode", {"samples": ["81", 1], "audio_vae": [sound, 2]}),
        (
            "86",
            "MF_Decode",
            {
                "vae": [loader, 1],
                "audio_vae": [sound, 2],
                "video": ["81", 0],
                "audio": ["81", 1],
                "part": "whole stream",
                "overlap": 3,
                "last": True,
            },
        ),
    ):
        prompt = with_node(prompt, key, kind, **inputs)
    for key, images, audio in (("a", "84", ["85", 0]), ("b", "86", ["86", 1])):
        clip = {"images": [images, 0], "audio": audio, "fps": 24.0, "bit_depth": 8}
        prompt = with_node(prompt, f"v{key}", "CreateVideo", **clip)
        save = {"filename_prefix": f"video/{key}", "format": "mp4", "format.codec": "h264"}
        prompt = with_node(prompt, f"s{key}", "SaveVideo", video=[f"v{key}", 0], **save)
    large, usual = sorted(server.saved(server.run(prompt)))
    assert frames_of(large).shape == (49, 2 * HEIGHT, 2 * WIDTH, 3)
    assert frames_of(usual).shape == (49, HEIGHT, WIDTH, 3)


def test_a_start_image_is_what_the_stream_begins_with(server: Server, schemas: dict) -> None:
    """VAE Encode's latent, and LTXVImgToVideo's with its mask, are the same start."""
    prompt = shrunken("6_ltx2_image_to_clip.json", schemas)
    inputs_of(prompt, "MF_LoadLTX2")[0]["weights"] = "as in the file"
    inputs_of(prompt, "MF_GenerateClip")[0]["seconds"] = 1
    plain = made(server, prompt, "encoded")
    free = deepcopy(prompt)
    del inputs_of(free, "MF_StreamSettings")[0]["start"]
    assert not torch.equal(made(server, free, "free").latents[0].video, plain.latents[0].video)
    text, loader = node_of(prompt, "CLIPTextEncode"), node_of(prompt, "MF_LoadLTX2")
    wires = {
        "positive": [text, 0],
        "negative": [text, 0],
        "vae": [loader, 1],
        "image": [node_of(prompt, "ImageScale"), 0],
    }
    sizes = {"width": WIDTH, "height": HEIGHT, "length": 97, "batch_size": 1, "strength": 1.0}
    prompt = with_node(prompt, "80", "LTXVImgToVideo", **wires, **sizes)
    inputs_of(prompt, "MF_StreamSettings")[0]["start"] = ["80", 2]
    assert equal(made(server, prompt, "masked"), plain)
    prompt["80"]["inputs"]["strength"] = 0.5
    assert "strength of the image to 1" in refusal(server, with_save(prompt))


# What an artist reads when something is wrong.


def test_a_node_says_what_its_wires_carry_in_vain_and_that_a_model_is_not_causal(
    server: Server, schemas: dict
) -> None:
    prompt = with_save(text_to_clip(schemas))
    (chunk,) = inputs_of(prompt, "MF_SampleChunk")
    chunk |= {"model": ["81", 0], "seconds": 1, "mode": "few steps", "mode.steps": 3}
    chunk["negative"] = chunk["positive"]
    prompt = with_node(prompt, "80", "CheckpointLoaderSimple", ckpt_name=BASE)
    patch = {"scale": 5.0, "blocks": "0", "start_percent": 0.0, "end_percent": 1.0}
    prompt = with_node(prompt, "81", "LTXVSpatioTemporalGuidance", model=["80", 0], **patch)
    queued = server.queue(prompt)
    server.finished(queued)
    said = "\n".join(run_named(server, queued)["words"])
    assert "expect noise: the model is a transformer of LTX-2 of which nothing says" in said
    assert "does nothing here, on the wire to 'model': LTXVSpatioTemporalGuidance" in said
    assert "'negative' does nothing here" in said
    assert "few steps: 3 are asked for, and this model learned 4" in said


def test_mistakes_are_named_with_a_next_step(server: Server, schemas: dict) -> None:
    prompt = with_save(text_to_clip(schemas))
    loader, chunk = node_of(prompt, "MF_LoadLTX2"), node_of(prompt, "MF_SampleChunk")

    wrong = deepcopy(prompt)
    wrong[loader]["inputs"]["file"] = "gone"
    assert "is not there: choose another one, or download" in refusal(server, wrong)
    for widget, name, what in (
        ("file", "lora.safetensors", "it is a LoRA; choose it in Load LoRA"),
        ("base", "lora.safetensors", "it is a LoRA"),
        ("file", CONNECTORS, "LTX-2's connectors alone; choose it as base"),
    ):
        wrong = deepcopy(prompt)
        wrong[loader]["inputs"][widget] = name
        assert f"the {widget} '{name}' does not fit here: it is" in (said := refusal(server, wrong))
        assert what in said
    assert CONNECTORS in schemas["MF_LoadLTX2"]["input"]["required"]["base"][1]["options"]

    images = {"image": ["83", 0], "amount": 49}
    wrong = with_node(prompt, "83", "EmptyImage", width=WIDTH, height=HEIGHT, batch_size=1, color=9)
    wrong = with_node(wrong, "84", "RepeatImageBatch", **images)
    wrong = with_node(wrong, "85", "VAEEncode", pixels=["84", 0], vae=[loader, 1])
    inputs_of(wrong, "MF_StreamSettings")[0]["start"] = ["85", 0]
    assert "the start has 7 latents, and the first second of this" in refusal(server, wrong)
    wrong = deepcopy(prompt)
    inputs_of(wrong, "MF_StreamSettings")[0]["width"] = 32
    assert "needs at least 64 pixels each way" in refusal(server, wrong)

    small = {"file": "mutual_forcing_small.safetensors", "dtype": "float32", "attention": "PyTorch"}
    wrong = with_node(prompt, "80", "MF_LoadModel", **small)
    wrong[node_of(wrong, "CLIPTextEncode")]["inputs"] = {"clip": ["80", 1], "text": "red ball"}
    assert "Load LTXV Audio Text Encoder" in refusal(server, wrong)

    wrong = deepcopy(prompt)
    wrong[chunk]["inputs"] |= {"mode": "many steps", "mode.steps": 1, "mode.guidance": 3.0}
    assert "guidance needs a second prompt to lead away from" in refusal(server, wrong)

    decoding = {"vae": [loader, 1], "audio_vae": [loader, 1], "part": "this chunk", "overlap": 3}
    decoding |= {"video": [chunk, 1], "audio": [chunk, 2], "last": True}
    wrong = with_node(prompt, "81", "MF_Decode", **decoding)
    wrong = with_node(wrong, "82", "PreviewImage", images=["81", 0])
    assert "is not a VAE for sound" in refusal(server, wrong)
