"""JavisBench's numbers: formulas by hand, random weights of the real format, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mutual_forcing.lab import command
from mutual_forcing.lab.metrics import folder, javisbench, text_scores
from mutual_forcing.lab.metrics.text_scores import TextScores
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
LETTERS = [chr(code) for code in range(97, 123)]


def film(path: Path, seconds: int = 2, sound: bool = True) -> Path:
    """Pictures of noise with a rising tone."""
    generator = np.random.default_rng(seconds)
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width = video.height = 32
        heard = out.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for _ in range(24 * seconds):
            picture = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(video.encode(None))
        if heard is not None:
            times = np.arange(16_000 * seconds) / 16_000
            wave = (0.3 * np.sin(600 * times**2)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
            frame.sample_rate = 16_000
            out.mux(heard.encode(frame))
            out.mux(heard.encode(None))
    return path


def small(**more: object) -> dict[str, object]:
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return common | {"num_attention_heads": 2} | more


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and CLAP with random weights, as transformers writes them."""
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        RobertaTokenizer,
    )

    made = tmp_path_factory.mktemp("weights")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(x + "</w>" for x in LETTERS)]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, merges=[])
    vision = small(image_size=32, patch_size=16)
    text = small(vocab_size=len(words), bos_token_id=0, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        clip.save_pretrained(made / "clip")
        pixels = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        CLIPProcessor(pixels, tokenizer).save_pretrained(made / "clip")
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]
        tokenizer = RobertaTokenizer({word: i for i, word in enumerate(words)}, merges=[])
        audio = {
            "spec_size": 256, "num_mel_bins": 64, "hidden_size": 16, "patch_embeds_hidden_size": 8,
            "depths": [1, 1], "num_attention_heads": [1, 2], "window_size": 4, "projection_dim": 8,
        }  # fmt: skip
        text = small(vocab_size=len(words), max_position_embeddings=80, projection_dim=8)
        clap = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))
        clap.save_pretrained(made / "clap")
        heard = ClapFeatureExtractor(feature_size=64, truncation="rand_trunc")
        ClapProcessor(heard, tokenizer).save_pretrained(made / "clap")
    return made


def test_scores_by_hand() -> None:
    """The plane: 1, 0 and their bisector, whose cosine is the root of a half."""
    x, y, both = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0])
    root = math.sqrt(0.5)
    made = {"imagebind.text": x, "imagebind.video": both, "imagebind.audio": y}
    found = javisbench.scores(made, 24)
    assert found == pytest.approx({"TV-IB": root, "TA-IB": 0, "AV-IB": root}, abs=1e-6)
    frames = torch.stack([x, both, y, y, y, y, -y, -y, -y, -y])
    made |= {"imagebind.frames": frames, "imagebind.windows": torch.stack([y, y])}
    found = javisbench.scores(made, 10)  # windows of five frames, of which two count
    assert found["AVHScore"] == pytest.approx((0 + root + 4 - 4) / 10)
    assert found["JavisScore"] == pytest.approx(((0 + root) / 2 - 1) / 2)
    assert javisbench.windows(12, 10) == [range(0, 5), range(5, 10), range(7, 12)]
    assert javisbench.windows(3, 10) == [range(3)]
    logits = torch.zeros(3, 21)
    logits[0, 10] = logits[1, 0] = logits[2, 11] = 1  # none, 2 s early, 0.2 s late
    assert javisbench.desync(logits) == pytest.approx(2.2 / 3)


def test_distances_are_those_of_the_moments() -> None:
    """Equal spread, and means that are 3 and 4 apart; FAD as the benchmark prints it."""
    generator = torch.Generator().manual_seed(0)
    real = {name: torch.randn(9, 2, generator=generator) for name in ("i3d", "audioclip")}
    films = [
        {"i3d": one + torch.tensor([3.0, 4.0]), "audioclip": other}
        for one, other in zip(real["i3d"], real["audioclip"], strict=True)
    ]
    found = javisbench.distances(films, real)
    assert found == pytest.approx({"FVD": 25.0, "FAD": 0.0}, abs=1e-3)
    far = [{"audioclip": film["audioclip"] + 1} for film in films]
    assert javisbench.distances(far, real) == pytest.approx({"FAD": 20_000.0}, rel=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        javisbench.distances(films[:1], real)


def test_clip_and_clap_are_what_the_library_makes_of_frames_and_sound(
    weights: Path, tmp_path: Path
) -> None:
    clip = film(tmp_path / "a.mp4", seconds=12)
    both = TextScores(weights / "clip", weights / "clap")
    frames = 24 * 12
    found = both.of(clip, frames, "a red ball")
    model, processor = both._models["CLIP"]
    indices = np.linspace(0, frames - 1, text_scores.FRAMES).round().astype(int)
    with av.open(clip) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with torch.inference_mode():
        alike = []
        for index in indices:
            inputs = processor(text=["a red ball"], images=[shown[index]], return_tensors="pt")
            alike.append(float(model(**inputs).logits_per_text / model.logit_scale.exp()))
    assert found["CLIP"] == pytest.approx(np.mean(alike), abs=1e-5)
    # The second piece is the two seconds and the encoder's delay that 10 s leave.
    wave = text_scores._wave(clip, 48_000)
    assert 12 <= len(wave) / 48_000 < 12.2
    model, processor = both._models["CLAP"]
    with torch.inference_mode():
        alike = []
        for piece in (wave[:480_000], wave[480_000:]):
            inputs = processor(
                text=["a red ball"], audio=[piece], sampling_rate=48_000, return_tensors="pt"
            )
            made = model(**inputs)
            alike.append(float(made.text_embeds @ made.audio_embeds.T))
    assert found["CLAP"] == pytest.approx(np.mean(alike), abs=1e-5)
    silent = film(tmp_path / "silent.mp4", sound=False)
    assert TextScores(None, weights / "clap").of(silent, 48, "ball") == {"CLAP": None}


def test_weights_that_lack_something_are_refused(weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "clip"
    broken.mkdir()
    for file in (weights / "clip").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of CLIP's weights, visual_projection\.weight"):
        TextScores(broken, None)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="holds no CLIP as transformers reads it"):
        TextScores(broken, None)
    with pytest.raises(ValueError, match="no such folder: laion/clap"):
        TextScores(None, Path("laion/clap"))


def test_a_folder_has_a_third_table(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        film(tmp_path / f"{name}.mp4")
    (tmp_path / "one.txt").write_text("a red ball\n")
    made = tmp_path / "made"
    made.mkdir()
    for number, name in enumerate(("one", "two")):
        keys = "imagebind.video", "imagebind.audio", "i3d"
        numbers = {key: torch.arange(4.0) + number for key in keys}
        save_file(numbers, made / f"{name}.mp4.safetensors")
    save_file({"i3d": torch.arange(8.0).view(2, 4)}, tmp_path / "real.safetensors")
    words = [str(tmp_path), "--clip", str(weights / "clip"), "--embeddings", str(made)]
    words += ["--real", str(tmp_path / "real.safetensors")]
    assert command.run(folder.parser(), folder.work, words) == 0
    found = json.loads((tmp_path / "measured" / "folder.json").read_text())
    one, two = (found["films"][f"{name}.mp4"] for name in ("one", "two"))
    assert one["AV-IB"] == pytest.approx(1) and "CLAP" not in one
    assert found["all"]["CLIP"] == one["CLIP"] and "CLIP" not in two and found["all"]["FVD"] > 0
    assert "two.mp4 has no CLIP and no CLAP: no caption" in caplog.text
    text = (tmp_path / "measured" / "folder.md").read_text()
    assert "| film | CLIP | AV-IB | FVD |" in text and "| all | " in text
    for option in folder.UNHELD:
        assert command.run(folder.parser(), folder.work, [str(tmp_path), f"--{option}", "x"]) == 2
    assert "no library that is kept holds ImageBind" in caplog.text
    save_file({"imagebind.text": torch.zeros(2, 2)}, made / "one.mp4.safetensors")
    assert command.run(folder.parser(), folder.work, words) == 2
    assert "found imagebind.text (2, 2)" in caplog.text
