"""The example workflows, without ComfyUI: flat, whole, and made of nodes that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutual_forcing.model_loaders.memory import stream_bytes
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.tests.ui_workflow import NOTES, read_workflow
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# Nodes of ComfyUI itself that the workflows use.
CORE = {
    "CLIPTextEncode",
    "CreateVideo",
    "ImageScale",
    "LoadImage",
    "LTXAVTextEncoderLoader",
    "SaveVideo",
    "VAEEncode",
}
OURS = {
    name
    for path in (ROOT / "nodes").glob("*.py")
    for name in re.findall(r'(?<!_)node_id="(\w+)"', path.read_text(encoding="utf-8"))
}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def test_the_folder_is_flat_and_has_the_workflows() -> None:
    assert len(WORKFLOWS) >= 8
    assert not [path for path in (ROOT / "example_workflows").iterdir() if path.is_dir()]


@each_workflow
def test_every_node_exists_in_this_pack_or_in_comfyui(path: Path) -> None:
    types = {node["type"] for node in read_workflow(path)["nodes"]}
    assert types <= OURS | CORE | NOTES
    assert types & OURS, "shows nothing of this pack"
    assert "MarkdownNote" in types, "says nothing about itself"


@each_workflow
def test_wires_end_where_the_nodes_say(path: Path) -> None:
    workflow = read_workflow(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    seen_in, seen_out = set(), set()
    for link, source, out_slot, target, in_slot, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert link in output["links"] and entry["link"] == link
        assert output["type"] == kind and kind in entry["type"].split(",")
        seen_out.add((source, out_slot, link))
        seen_in.add((target, in_slot))
    for node in workflow["nodes"]:
        for slot, entry in enumerate(node["inputs"]):
            assert (entry["link"] is not None) == ((node["id"], slot) in seen_in)
        for slot, output in enumerate(node["outputs"]):
            for link in output["links"] or []:
                assert (node["id"], slot, link) in seen_out
    assert workflow["last_node_id"] >= max(nodes)
    assert "subgraphs" not in workflow.get("definitions", {})


@each_workflow
def test_nodes_do_not_lie_on_each_other(path: Path) -> None:
    title = 30  # pixels above a node's position
    boxes = [
        (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in read_workflow(path)["nodes"]
    ]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other_left, other_top, other_right, other_bottom in boxes[i + 1 :]:
            apart = (
                right <= other_left
                or other_right <= left
                or bottom <= other_top - title
                or other_bottom <= top - title
            )
            assert apart


@each_workflow
def test_nodes_are_in_groups_and_readable_when_the_whole_graph_is_shown(path: Path) -> None:
    """The page draws no text below 0.57, and fits a graph into three quarters of its window."""
    workflow = read_workflow(path)
    groups = [group["bounding"] for group in workflow["groups"]]
    assert len(groups) >= 3 and all(group["title"] for group in workflow["groups"])
    edges = []
    for node in workflow["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        edges.append((left, top, left + width, top + height))
        inside = [
            x <= left and y <= top and left + width <= x + w and top + height <= y + h
            for x, y, w, h in groups
        ]
        assert any(inside) or node["type"] in NOTES, node["type"]
    left, top, right, bottom = zip(*edges, strict=True)
    width, height = max(right) - min(left), max(bottom) - min(top)
    assert 0.75 * min(1600 / width, 1000 / height) > 0.57


@each_workflow
def test_it_says_which_version_of_the_pack_it_is_for(path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    for node in read_workflow(path)["nodes"]:
        if node["type"] in OURS:
            assert node["properties"]["ver"] == version


@each_workflow
def test_a_picture_shows_what_it_makes(path: Path) -> None:
    if not (ROOT / "models" / "mutual_forcing_small.safetensors").exists():
        pytest.skip("the model that makes the pictures is not trained yet")
    picture = path.with_suffix(".jpg")
    assert picture.is_file(), (
        "make it: python launch.py lab.metrics.thumbnails; for LTX-2 it is a picture of the graph"
    )
    with Image.open(picture) as opened:  # a browser goes by what is in it
        assert getattr(opened, "is_animated", False) == ("ltx2" not in path.stem)


def test_the_blueprint_is_the_first_template_inside() -> None:
    (path,) = (ROOT / "subgraphs").glob("*.json")
    blueprint = read_workflow(path)
    (inside,) = blueprint["definitions"]["subgraphs"]
    (node,) = blueprint["nodes"]
    assert node["type"] == inside["id"] and path.stem == inside["name"]
    template = read_workflow(ROOT / "example_workflows" / "1_text_to_clip.json")
    shared = OURS | {"CLIPTextEncode"}
    made, expected = (
        {each["id"]: each["widgets_values"] for each in graph["nodes"] if each["type"] in shared}
        for graph in (inside, template)
    )
    assert made == expected and len(inside["nodes"]) == len(made)
    within = {each["id"]: each for each in inside["nodes"]}
    for link in inside["links"]:
        if link["target_id"] in within:
            entry = within[link["target_id"]]["inputs"][link["target_slot"]]
            assert entry["link"] == link["id"] and link["type"] in entry["type"].split(",")
    for side in ("inputs", "outputs"):
        assert [x["name"] for x in node[side]] == [x["name"] for x in inside[side]]


@pytest.mark.parametrize("name", ["2_chunks_and_a_fork", "7_ltx2_chunks_and_a_fork"])
def test_one_stream_is_forked(name: str) -> None:
    """Three chunks on one state, and the state before the last one goes to two chunks."""
    workflow = read_workflow(ROOT / "example_workflows" / f"{name}.json")
    chunks = {node["id"] for node in workflow["nodes"] if node["type"] == "MF_SampleChunk"}
    states = [link for link in workflow["links"] if link[5] == "MF_STATE" and link[3] in chunks]
    followers = [link[1] for link in states]
    assert len(chunks) == 4 and len(states) == 3
    assert sorted(followers.count(chunk) for chunk in set(followers)) == [1, 2]


def without_loaders(workflow: dict) -> dict[str, object]:
    """Nodes by type and number with their wires and widgets; no loaders, notes and words."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    place_of = {}  # among those of its type
    for node in nodes.values():
        same = sum(known.startswith(f"{node['type']} ") for known in place_of.values())
        place_of[node["id"]] = f"{node['type']} {same}"
    kept = {}
    for node in nodes.values():
        if node["type"] in NOTES or "Load" in node["type"]:
            continue
        wires = {}
        for _, source, slot, target, place, kind in workflow["links"]:
            if target != node["id"]:
                continue
            loaded = "Load" in nodes[source]["type"]
            wires[node["inputs"][place]["name"]] = (
                nodes[source]["outputs"][slot]["name"] if kind == "VAE" or not loaded else kind,
                "loader" if loaded else place_of[source],
            )
        values = [] if node["type"] == "CLIPTextEncode" else node["widgets_values"]
        kept[place_of[node["id"]]] = (node.get("title"), wires, values)
    return kept


@pytest.mark.parametrize(
    "names",
    [
        ("1_text_to_clip", "5_ltx2_text_to_clip"),
        ("2_chunks_and_a_fork", "7_ltx2_chunks_and_a_fork"),
    ],
)
def test_the_model_may_be_swapped_and_the_graph_stays(names: tuple[str, str]) -> None:
    """The small model's template and LTX-2's are one graph but for loaders and text."""
    small, ltx2 = (
        without_loaders(read_workflow(ROOT / "example_workflows" / f"{name}.json"))
        for name in names
    )
    assert small == ltx2
    for _, wires, _ in small.values():
        if "vae" in wires:
            assert wires["vae"] == ("vae", "loader")
            assert wires["audio_vae"] == ("audio VAE", "loader")


def gigabytes(width: int, height: int, seconds: int = 3) -> float:
    """What a stream of OmniForcing takes beside the weights, as Sample Chunk asks for it."""
    config = TransformerConfig(video_first_block=4, audio_first_block=26)
    grid = height // 32, width // 32
    return (
        stream_bytes(config, seconds, *grid, element_size=2, guided=False, text_tokens=1024) / 1e9
    )


def test_the_note_of_ltx2_says_what_is_computed() -> None:
    path = ROOT / "example_workflows" / "5_ltx2_text_to_clip.json"
    notes = [n["widgets_values"][0] for n in read_workflow(path)["nodes"] if n["type"] in NOTES]
    text = "\n".join(notes)
    sizes = re.findall(r"\| (\d+) x (\d+) \| ([\d.]+) \|", text)
    assert len(sizes) == 4
    for width, height, said in sizes:
        assert float(said) == pytest.approx(gigabytes(int(width), int(height)), abs=0.06)
    shorter = re.search(r"([\d.]+) GB with 2 seconds at 768 x 512", text)
    assert float(shorter[1]) == pytest.approx(gigabytes(768, 512, 2), abs=0.06)


@each_workflow
def test_a_rate_is_set_in_one_place(path: Path) -> None:
    """Where a clip is put together of pictures and sound, it has the rate of the stream."""
    nodes = read_workflow(path)["nodes"]
    assert all(node["type"] != "LTXVConditioning" for node in nodes)
    for node in (node for node in nodes if node["type"] == "CreateVideo"):
        (rate,) = [entry for entry in node["inputs"] if entry["name"] == "fps"]
        assert rate["link"] is not None


@pytest.mark.parametrize("node", sorted(OURS))
def test_every_node_has_a_page_that_names_all_its_sockets(node: str) -> None:
    """Those in its own schema; what both sampling nodes share is in `nodes/request.py`."""
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    (source,) = [
        text.partition(f'    node_id="{node}"')[2].partition("def ")[0]
        for path in (ROOT / "nodes").glob("*.py")
        if f'    node_id="{node}"' in (text := path.read_text(encoding="utf-8"))
    ]
    sockets = re.findall(r'put\(\s*"(\w+)"((?:(?!put\().)*)', source, re.DOTALL)
    assert sockets
    for name, rest in sockets:
        shown = re.search(r'display_name="([^"]+)"', rest)
        assert f"| {shown[1] if shown else name} |" in page
