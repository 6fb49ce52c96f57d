"""The example workflows as graphs for ComfyUI's API, made smaller, and with tiny random models in them."""

from __future__ import annotations

import copy
import json
from typing import Any

from comfyui.conditioned import CONDITIONED, clip_node, latent_node
from comfyui.host import ROOT
from comfyui.server import node

FOLDER = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")
SEEDS = ("seed", "noise_seed")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
SMALL = {"steps": 2, "width": 64, "height": 64}  # instead of what a user would choose

Graph = dict[str, dict[str, Any]]


def workflow(name: str) -> dict[str, Any]:
    """What the frontend opens."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def api_graph(ui: dict[str, Any], info: dict[str, Any]) -> Graph:
    """What the frontend sends for a workflow; ``info`` is the server's ``/object_info``."""
    origins = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    out = {}
    for item in ui["nodes"]:
        if item["type"] in NOTES:
            continue
        linked = {entry["name"]: origins[entry["link"]] for entry in item["inputs"] if entry["link"] is not None}
        specs = info[item["type"]]["input"]
        declared = {**specs.get("required", {}), **specs.get("optional", {})}
        values = iter(item.get("widgets_values", []))
        inputs = {}
        for name, spec in declared.items():
            if name in linked:
                inputs[name] = linked[name]
            elif isinstance(spec[0], list) or spec[0] in WIDGETS:
                inputs |= _widget(name, spec, values)
        assert not list(values), f"{item['type']} has more values than widgets"
        out[str(item["id"])] = node(item["type"], **inputs)
    return out


def _widget(name: str, spec: list[Any], values: Any) -> dict[str, Any]:
    """The value of an input, of what a dynamic one shows beside it, and past the one that counts seeds up."""
    options = spec[1] if len(spec) > 1 else {}
    out = {name: next(values)}
    if options.get("control_after_generate", name in SEEDS):
        next(values)
    for choice in options.get("options", []) if spec[0] == "COMFY_DYNAMICCOMBO_V3" else []:
        if choice["key"] == out[name]:
            for inner, inner_spec in choice["inputs"].get("required", {}).items():
                out |= _widget(f"{name}.{inner}", inner_spec, values)
    return out


def shrunk(graph: Graph) -> Graph:
    """The same graph with few steps and small images."""
    graph = copy.deepcopy(graph)
    for item in graph.values():
        for name, value in SMALL.items():
            if name in item["inputs"] and item["class_type"] != "ImageScale":
                item["inputs"][name] = value
    return graph


FILES = {
    ("QDiffLoadModel", "checkpoint"): "{}",
    ("UNETLoader", "unet_name"): "{}.safetensors",
    ("LoraLoaderModelOnly", "lora_name"): "{}.safetensors",
    ("QDiffSaveModel", "name"): "made/{}",
}
CLIP_LOADERS = ("DualCLIPLoader", "QDiffLoadCLIP")


def for_family(graph: Graph, family: str) -> Graph:
    """The same graph with the tiny model of a family, and the text encoders, latent and VAE that belong to it."""
    out = shrunk(graph)
    for key, item in out.items():
        for name in item["inputs"]:
            if pattern := FILES.get((item["class_type"], name)):
                item["inputs"][name] = pattern.format(family)
        if item["class_type"] in CLIP_LOADERS:
            out[key] = clip_node(family)
        elif item["class_type"] == "EmptySD3LatentImage":
            out[key] = latent_node(family)
        elif item["class_type"] == "VAELoader":
            item["inputs"]["vae_name"] = CONDITIONED[family].vae
    return out
