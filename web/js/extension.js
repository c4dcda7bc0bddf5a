// Puts a player on the nodes that sample, as soon as they run, what a saved stream is on Load
// Stream, and the pack's templates in order.
// Plain DOM widgets, which the classic canvas and the newer node renderer both show.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Player } from "./player.js";
import { refresh, showAll, showIn } from "./streams.js";
import { learn } from "./words.js";

const EVENT = "mutual_forcing.run"; // host/page.py
const WIDGET = "mutual_forcing_player";
const PLAYED = ["MF_GenerateClip", "MF_SampleChunk"];
const HEIGHT = 300;
const LINES_HEIGHT = 150; // for six prompts

/** The latest status of every node's run in this session: what a graph that is opened again shows. */
const runs = new Map();

const rootGraph = () => app.rootGraph ?? app.graph;

/** The node that ComfyUI calls `id`, "5:3" being node 3 inside of subgraph node 5. */
function nodeOf(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function show(status) {
  runs.set(`${status.workflow} ${status.node_id}`, status);
  const here = rootGraph()?.id;
  if (status.workflow && here && status.workflow !== here) return; // another tab's
  if (!PLAYED.includes(nodeOf(status.node_id)?.comfyClass)) return;
  // Of a subgraph the outermost node is what an artist sees.
  playerOf(nodeOf(status.node_id.split(":")[0])).show(status);
}

function playerOf(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found.player;
  const player = new Player(api);
  const widget = node.addDOMWidget(WIDGET, "mutual_forcing_player", player.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  widget.player = player;
  const { onRemove } = widget;
  widget.onRemove = function () {
    player.close();
    onRemove?.call(this);
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0], 320), Math.max(height, node.size[1])]);
  node.setDirtyCanvas(true, true);
  return player;
}

/** ComfyUI lists a pack's templates in the disk's order; ours are numbered, what runs at once first. */
function orderTemplates() {
  const pack = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-3));
  const asked = api.getWorkflowTemplates?.bind(api);
  if (!asked) return;
  api.getWorkflowTemplates = async () => {
    const listed = await asked();
    listed[pack]?.sort();
    return listed;
  };
}

orderTemplates();
app.registerExtension({
  name: "MutualForcing.Player",
  async setup() {
    await learn(app, api);
    api.addEventListener(EVENT, ({ detail }) => show(detail));
    const answer = await api.fetchApi("/mutual_forcing/live");
    if (answer.ok) for (const status of await answer.json()) show(status);
    await refresh(api);
  },
  refreshComboInNodes: () => refresh(api),
  nodeCreated(node) {
    if (node.comfyClass === "MF_LoadState") showIn(node);
    // ComfyUI makes a node whose combo brings widgets of its own as small as it can be.
    const lines = node.widgets?.find((widget) => widget.name === "lines");
    if (node.comfyClass === "MF_PromptSchedule" && lines?.options)
      lines.options.getMinHeight = () => LINES_HEIGHT;
  },
  afterConfigureGraph() {
    for (const status of runs.values()) show(status);
    showAll();
  },
});
