// Shows what a node says as text: ComfyUI itself does so for its own nodes only.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const NODES = ["QDiffModelInfo", "QDiffCompare", "QDiffSaveModel"];
const NAME = "qdiff_text";
const LINE = 14; // pixels

function show(node, text) {
  let widget = node.widgets?.find((w) => w.name === NAME);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app).widget;
    widget.serialize = false; // neither stored with the workflow
    widget.options.serialize = false; // nor sent to the server
    const element = widget.element ?? widget.inputEl;
    element.readOnly = true;
    Object.assign(element.style, { fontFamily: "monospace", whiteSpace: "pre", overflow: "auto" });
    const height = Math.min(20, text.split("\n").length + 1) * LINE + 10;
    widget.options.getMinHeight = () => height;
  }
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "qdiff.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const original = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      original?.apply(this, arguments);
      if (message?.text) show(this, [message.text].flat().join("\n"));
    };
  },
});
