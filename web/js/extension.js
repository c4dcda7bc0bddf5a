// Puts a player on the nodes that sample, as soon as they run. Plain DOM widgets, which the classic
// canvas and the newer node renderer both show.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Player } from "./player.js";

const EVENT = "mutual_forcing.run"; // host/page.py
const WIDGET = "mutual_forcing_player";
const HEIGHT = 300;

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
  const node = nodeOf(status.node_id);
  if (node?.comfyClass?.startsWith("MF_")) playerOf(node).show(status);
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

app.registerExtension({
  name: "MutualForcing.Player",
  async setup() {
    api.addEventListener(EVENT, ({ detail }) => show(detail));
    const answer = await api.fetchApi("/mutual_forcing/live");
    if (answer.ok) for (const status of await answer.json()) show(status);
  },
  afterConfigureGraph() {
    for (const status of runs.values()) show(status);
  },
});
