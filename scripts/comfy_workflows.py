"""Writes example_workflows/*.json. Run it after a change of the nodes' inputs: python scripts/comfy_workflows.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "example_workflows"


class Node(NamedTuple):
    """A node of a workflow: its sockets, its widgets' values in order, and where it stands."""

    kind: str
    position: tuple[int, int]
    size: tuple[int, int]
    inputs: dict[str, tuple[str, str, int]] = {}  # noqa: RUF012 - name: (type, node, its output)
    outputs: tuple[str, ...] = ()
    widgets: tuple[Any, ...] = ()
    title: str | None = None


def workflow(nodes: dict[str, Node]) -> dict[str, Any]:
    """The frontend's JSON."""
    ids = {name: i for i, name in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    made = []
    for name, node in nodes.items():
        sockets = []
        for slot, (socket, (kind, source, output)) in enumerate(node.inputs.items()):
            links.append([len(links) + 1, ids[source], output, ids[name], slot, kind])
            sockets.append({"name": socket, "type": kind, "link": len(links)})
        entry = {
            "id": ids[name],
            "type": node.kind,
            "pos": list(node.position),
            "size": list(node.size),
            "flags": {},
            "order": ids[name] - 1,
        }
        entry |= {
            "mode": 0,
            "inputs": sockets,
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": list(node.widgets),
        }
        made.append(entry | ({"title": node.title} if node.title else {}))
    for entry, node in zip(made, nodes.values(), strict=True):
        entry["outputs"] = [
            {"name": kind, "type": kind, "links": [link[0] for link in links if link[1:3] == [entry["id"], slot]] or None}
            for slot, kind in enumerate(node.outputs)
        ]
    shape = {"last_node_id": len(made), "last_link_id": len(links), "nodes": made, "links": links}
    return shape | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def note(text: str, position: tuple[int, int], size: tuple[int, int] = (360, 140)) -> Node:
    return Node("Note", position, size, widgets=(text,))


PIPE = "QDIFF_PIPELINE"


def demo() -> dict[str, Node]:
    load, sample = ("QDiffLoadPipeline", (330, 150)), ("QDiffSamplePipeline", (330, 260))
    prompt = ("0, 1, 2, 3, 4, 5, 6, 7, 8, 9", 0, "fixed", 20, 2.0, 10)
    return {
        "note": note(
            "Press Run: the bundled model draws ten kinds of clothing, as stored and at 3 bits. Nothing to download.", (40, 40)
        ),
        "dense": Node(load[0], (40, 220), load[1], outputs=(PIPE,), widgets=("demo model (bundled)", "as stored"), title="16 bits"),
        "packed": Node(
            load[0], (40, 560), (330, 190), outputs=(PIPE,), widgets=("demo model (bundled)", "vq", "3", "none"), title="3 bits"
        ),
        "draw": Node(sample[0], (420, 220), sample[1], {"pipeline": (PIPE, "dense", 0)}, ("IMAGE",), prompt),
        "redraw": Node(sample[0], (420, 560), sample[1], {"pipeline": (PIPE, "packed", 0)}, ("IMAGE",), prompt),
        "show": Node("PreviewImage", (800, 220), (420, 300), {"images": ("IMAGE", "draw", 0)}),
        "reshow": Node("PreviewImage", (800, 560), (420, 300), {"images": ("IMAGE", "redraw", 0)}),
    }


def quantize() -> dict[str, Node]:
    return {
        "note": note("Choose a model of yours, press Run: the quantized one is saved in models/qdiff.", (40, 40)),
        "dense": Node("UNETLoader", (40, 220), (330, 90), outputs=("MODEL",), widgets=("flux1-dev.safetensors", "default")),
        "quantize": Node(
            "QDiffQuantizeModel",
            (420, 220),
            (340, 260),
            {"model": ("MODEL", "dense", 0)},
            ("MODEL",),
            ("svdquant", "4", 0, "none", "", False, 0),
        ),
        "save": Node("QDiffSaveModel", (810, 220), (340, 110), {"model": ("MODEL", "quantize", 0)}, widgets=("my-model-4bit",)),
        "info": Node("QDiffModelInfo", (810, 390), (560, 300), {"model": ("MODEL", "quantize", 0)}, ("STRING",)),
        "report": Node("QDiffReport", (810, 740), (560, 360), {"model": ("MODEL", "quantize", 0)}, ("IMAGE",)),
    }


def sample() -> dict[str, Node]:
    model, conditioning = ("MODEL", "lora", 0), ("CONDITIONING", "guidance", 0)
    return {
        "note": note("A quantized Flux with a LoRA and the stock sampler. Choose your files in the loaders.", (40, 40)),
        "model": Node("QDiffLoadModel", (40, 220), (330, 130), outputs=("MODEL",), widgets=("my-model-4bit", "auto", "auto")),
        "clip": Node(
            "DualCLIPLoader",
            (40, 400),
            (330, 130),
            outputs=("CLIP",),
            widgets=("clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default"),
        ),
        "vae": Node("VAELoader", (40, 580), (330, 60), outputs=("VAE",), widgets=("ae.safetensors",)),
        "lora": Node(
            "LoraLoaderModelOnly", (420, 220), (330, 90), {"model": ("MODEL", "model", 0)}, ("MODEL",), ("my-lora.safetensors", 1.0)
        ),
        "text": Node(
            "CLIPTextEncode", (420, 400), (330, 130), {"clip": ("CLIP", "clip", 0)}, ("CONDITIONING",), ("a red fox in the snow",)
        ),
        "guidance": Node(
            "FluxGuidance", (420, 580), (330, 60), {"conditioning": ("CONDITIONING", "text", 0)}, ("CONDITIONING",), (3.5,)
        ),
        "latent": Node("EmptySD3LatentImage", (420, 690), (330, 110), outputs=("LATENT",), widgets=(1024, 1024, 1)),
        "sample": Node(
            "KSampler",
            (800, 220),
            (330, 280),
            {"model": model, "positive": conditioning, "negative": conditioning, "latent_image": ("LATENT", "latent", 0)},
            ("LATENT",),
            (0, "fixed", 20, 1.0, "euler", "simple", 1.0),
        ),
        "decode": Node(
            "VAEDecode", (800, 550), (330, 50), {"samples": ("LATENT", "sample", 0), "vae": ("VAE", "vae", 0)}, ("IMAGE",)
        ),
        "save": Node("SaveImage", (1180, 220), (460, 520), {"images": ("IMAGE", "decode", 0)}, widgets=("qdiff",)),
    }


WORKFLOWS = {"qdiff_demo": demo, "qdiff_quantize_and_save": quantize, "qdiff_flux_with_lora": sample}

if __name__ == "__main__":
    for name, make in WORKFLOWS.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow(make()), indent=1) + "\n")
