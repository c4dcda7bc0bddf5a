// Load Stream's list, in which a stream can be recognised: length, prompt and date in the list
// itself, and a picture with the rest below it.

const HEIGHT = 120;
let streams = {};
const shown = new Set();

/** Ask again what there is. */
export async function refresh(api) {
  const answer = await api.fetchApi("/mutual_forcing/streams");
  if (answer.ok) streams = await answer.json();
  for (const show of shown) show();
}

/** Let a Load Stream node show what its file is. */
export function showIn(node) {
  const list = node.widgets?.find((widget) => widget.name === "file");
  if (!list) return;
  list.options.getOptionLabel = (name) => streams[name]?.label ?? String(name ?? "");
  const element = document.createElement("div");
  element.style.cssText =
    "display: flex; gap: 8px; overflow: auto; font: 12px sans-serif; color: var(--input-text)";
  const picture = document.createElement("img");
  picture.style.cssText = "height: 96px; border-radius: 4px; flex: none";
  const facts = document.createElement("div");
  facts.style.whiteSpace = "pre-line";
  element.append(picture, facts);
  const widget = node.addDOMWidget("mutual_forcing_stream", "mutual_forcing_stream", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const show = () => {
    const stream = streams[list.value];
    facts.textContent = stream?.facts ?? "";
    picture.hidden = !stream?.picture;
    if (stream?.picture) picture.src = stream.picture;
    else picture.removeAttribute("src");
    node.setDirtyCanvas(true, true);
  };
  const { callback } = list;
  list.callback = function (...values) {
    callback?.apply(this, values);
    show();
  };
  shown.add(show);
  const { onRemove } = widget;
  widget.onRemove = function () {
    shown.delete(show);
    onRemove?.call(this);
  };
  show();
}

/** After a graph was opened its nodes have their values. */
export const showAll = () => shown.forEach((show) => show());
