"""Model cards of quantized checkpoints, from the templates in ``hub_cards/``."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import PushToHubMixin
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..checkpoint import CheckpointInfo, inspect_components
from ..config import QDiffConfig

TAG = "qdiff"
METHOD_TITLES = {
    "aq": "additive codebooks (AQ)",
    "vq": "vector quantization (VQ)",
    "fp": "low-bitwidth floating point (FP)",
    "svdquant": "SVDQuant, a low-rank branch beside a low-bit residual",
    "rtn": "round-to-nearest",
}


def render_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a saved model or pipeline.

    Args:
        folder: holds the checkpoint.
        repo_id: name under which it will be loaded.

    Raises:
        CheckpointError: the folder holds no qdiff checkpoint.
    """
    folder = Path(folder)
    components = inspect_components(folder)
    largest = max(components, key=lambda c: c.packed_weights)
    config = largest.config
    is_pipeline = (folder / "model_index.json").is_file()
    context = {
        "title": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "summary": _summary(config, is_pipeline),
        "method_title": METHOD_TITLES[config.method_name],
        "bits": largest.bits_per_weight,
        "loader": "DiffusionPipeline" if is_pipeline else config.provenance.get("model_class", "AutoModel"),
        "variable": "pipe" if is_pipeline else "model",
        "dtype": config.compute_dtype or "bfloat16",
        "facts": _facts(config, largest),
        "components": [{"name": c.folder.name, "rows": _rows(c)} for c in components],
    }
    templates = FileSystemLoader(str(resources.files("qdiff_diffusers.hub_cards")))
    environment = Environment(loader=templates, undefined=StrictUndefined)
    text = environment.get_template(f"{config.method_name}.md.j2").render(context)
    base = config.provenance.get("base_model")
    data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag="text-to-image" if _is_text_to_image(folder) else "unconditional-image-generation",
        tags=[TAG, config.method_name, "quantized", "diffusers"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_card(folder: str | Path, repo_id: str) -> None:
    """Write README.md beside a checkpoint; a card that someone has written by hand (without our tag) stays."""
    path = Path(folder) / "README.md"
    if path.is_file():
        tags = ModelCard.load(path).data.tags or []
        generic = "has been automatically generated" in path.read_text()
        if TAG not in tags and not generic:
            return
    render_card(folder, repo_id).save(path)


def write_cards_on_upload() -> None:
    """Make ``push_to_hub`` of models and pipelines put our card in place of diffusers' generic one."""
    original = PushToHubMixin._upload_folder
    if getattr(original, "writes_qdiff_cards", False):
        return

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if _is_quantized(Path(working_dir)):
            write_card(working_dir, repo_id)
        return original(self, working_dir, repo_id, *args, **kwargs)

    upload.writes_qdiff_cards = True  # type: ignore[attr-defined]
    PushToHubMixin._upload_folder = upload  # type: ignore[method-assign]


def _is_quantized(folder: Path) -> bool:
    configs = (*folder.glob("config.json"), *folder.glob("*/config.json"))
    return any('"quant_method": "qdiff"' in path.read_text() for path in configs)


def _is_text_to_image(folder: Path) -> bool:
    index = folder / "model_index.json"
    return index.is_file() and any(name.startswith("tokenizer") for name in json.loads(index.read_text()))


def _summary(config: QDiffConfig, is_pipeline: bool) -> str:
    what = "pipeline" if is_pipeline else config.provenance.get("model_class", "model")
    base = config.provenance.get("base_model")
    return f"A {what} for diffusers, made from [{base}](https://huggingface.co/{base})." if base else f"A {what} for diffusers."


def _facts(config: QDiffConfig, info: CheckpointInfo) -> list[tuple[str, str]]:
    activations = sorted({layer.spec.activations for layer in config.layers.values()})
    names = ", ".join("16-bit" if a == "none" else a for a in activations)
    settings = ", ".join(f"{k}={v}" for k, v in config.settings().items() if k not in ("method", "overrides", "compute_dtype"))
    return [
        ("method", METHOD_TITLES[config.method_name]),
        ("settings", f"`{settings}`" if settings else "defaults"),
        ("activations", names),
        ("packed layers", f"{len(info.layers)} ({info.packed_weights / 1e6:.1f} M weights)"),
        ("layers left in 16 bits", str(len(config.skipped))),
        ("size on disk", human_size(info.total_bytes)),
        ("packed weights against 16 bits", f"{human_size(info.packed_bytes)} / {human_size(2 * info.packed_weights)}"),
        ("made by", config.provenance.get("package", "qdiff-diffusers")),
    ]


def _rows(info: CheckpointInfo) -> list[dict[str, Any]]:
    groups = defaultdict(list)
    for layer in info.layers:
        groups[layer.description].append(layer)
    rows = []
    for description, layers in sorted(groups.items(), key=lambda item: -sum(x.nbytes for x in item[1])):
        nbytes = sum(layer.nbytes for layer in layers)
        weights = sum(8 * layer.nbytes / layer.bits_per_weight for layer in layers)
        rows.append({"count": len(layers), "description": description, "bits": 8 * nbytes / weights, "size": human_size(nbytes)})
    return rows


def human_size(nbytes: float) -> str:
    """``12_345_678`` -> ``"12.3 MB"`` (decimal units, as the Hub shows them)."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
