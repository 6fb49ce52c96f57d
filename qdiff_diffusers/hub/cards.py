"""Model cards of quantized checkpoints, from the templates in ``hub_cards/``."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..checkpoint.files import says_quantized
from ..checkpoint.inspect import CheckpointInfo, inspect_components
from ..checkpoint.provenance import INHERITED, LICENSE_KEYS, hub_card, is_hub_name, task_of
from ..checkpoint.quantization import Quantization
from ..checkpoint.results import Results, read_results
from ..evaluation.published import Evaluated
from ..methods import method_of
from .contents import facts, kind_rows, legend, sample_files, samples, settings

TAG = "qdiff"
CARD = "README.md"
TEMPLATE = "base.md.j2"


def render_card(
    folder: str | Path, repo_id: str, base_card: dict[str, str] | None = None, evaluated: Evaluated | None = None
) -> ModelCard:
    """The card of a saved model or pipeline. Nothing is looked up on the Hub; see :func:`base_card`.

    Args:
        folder: folder of the checkpoint, and perhaps of ``qdiff_results.json`` and ``samples/``.
        repo_id: name under which it will be loaded.
        base_card: licence and task of the base model, used where the checkpoint does not record them.
        evaluated: results and samples to show, whatever the folder holds.

    Raises:
        CheckpointError: the folder holds no qdiff checkpoint, or malformed results.
    """
    folder = Path(folder)
    components = inspect_components(folder)
    largest = max(components, key=lambda c: c.packed_weights)
    known = (base_card or {}) | {key: v for key in INHERITED if isinstance(v := largest.config.provenance.get(key), str)}
    results = evaluated.results if evaluated else read_results(folder)
    data = _metadata(folder, repo_id, components, largest.config, known, results)
    pairs, single = samples(evaluated.samples if evaluated else sample_files(folder))
    context = _context(folder, repo_id, components, largest) | {
        "license": {key: known.get(key) for key in LICENSE_KEYS},
        "results": results,
        "pairs": pairs,
        "images": single,
    }
    templates = FileSystemLoader(str(resources.files("qdiff_diffusers.hub_cards")))
    environment = Environment(
        loader=templates, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template(TEMPLATE).render(context)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()  # template blocks without content leave blank lines
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def base_card(folder: str | Path) -> dict[str, str]:
    """Licence and task from the base model's card on the Hub; empty if the card cannot be read."""
    for info in inspect_components(folder):
        if base := info.config.provenance.get("base_model"):
            return hub_card(base)
    return {}


def write_card(folder: str | Path, repo_id: str) -> None:
    """Write README.md beside a checkpoint; a card that was written by hand (without qdiff's tag) stays."""
    path = Path(folder) / CARD
    if not is_handwritten(path):
        render_card(folder, repo_id, base_card(folder)).save(path)


def is_handwritten(path: Path) -> bool:
    """Whether there is a card that neither qdiff nor diffusers has generated."""
    if not path.is_file():
        return False
    tags = ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
    return TAG not in tags and "has been automatically generated" not in path.read_text(encoding="utf-8")


def write_cards_on_upload(original: Any, self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """The libraries' function by which ``push_to_hub`` uploads a folder, after a card has been written for qdiff checkpoints."""
    # A part of a larger repository (subfolder=...) has no card of its own.
    if not kwargs.get("subfolder") and _is_quantized(Path(working_dir)):
        write_card(working_dir, repo_id)
    return original(self, working_dir, repo_id, *args, **kwargs)


def _is_quantized(folder: Path) -> bool:
    """Whether a folder holds a qdiff checkpoint; a description without weights (``config.push_to_hub``) is none."""
    configs = (*folder.glob("config.json"), *folder.glob("*/config.json"))
    return any(says_quantized(path) and any(path.parent.glob("*.safetensors")) for path in configs)


def _metadata(
    folder: Path,
    repo_id: str,
    components: list[CheckpointInfo],
    config: Quantization,
    known: dict[str, str],
    results: Results | None,
) -> ModelCardData:
    base = config.provenance.get("base_model")
    base = base if is_hub_name(base) else None
    inherited = known.get("pipeline_tag") if _library(folder) == "diffusers" else None  # an encoder draws no pictures
    task = inherited or task_of(folder)
    packed, weights = sum(c.packed_bytes for c in components), sum(c.packed_weights for c in components)
    return ModelCardData(
        library_name=_library(folder),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag=task,
        tags=[TAG, config.method_name, "quantized", "diffusers"],
        quantization={
            "quant_method": "qdiff",
            "method": config.method_name,
            "bits_per_weight": round(8 * packed / max(1, weights), 3),
            "packed_bytes": packed,
            "packed_weights": weights,
            "components": [_component_name(c, folder) for c in components],
        },
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=_eval_results(results, task) if results else None,
    )


def _eval_results(results: Results, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=results.dataset_id,
            dataset_name=results.dataset_name,
            metric_type=result.metric,
            metric_name=f"{result.name} ({result.unit})" if result.unit else result.name,
            metric_value=result.value,
        )
        for result in results.results
    ]


def _context(folder: Path, repo_id: str, components: list[CheckpointInfo], largest: CheckpointInfo) -> dict[str, Any]:
    config = largest.config
    base = config.provenance.get("base_model")
    is_pipeline = (folder / "model_index.json").is_file()
    return {
        "title": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "what": "pipeline" if is_pipeline else "model",
        "base": base if is_hub_name(base) else None,
        "method": method_of(config.config),
        "bits": 8 * sum(c.packed_bytes for c in components) / max(1, sum(c.packed_weights for c in components)),
        "library": _library(folder),
        "loader": "DiffusionPipeline" if is_pipeline else _class_name(folder),
        "variable": "pipe" if is_pipeline else "model",
        "dtype": config.compute_dtype or "bfloat16",
        "facts": facts(config, components),
        "settings": settings(config),
        "calibrated": bool(config.provenance.get("calibration")),
        "components": [{"name": _component_name(c, folder), "rows": kind_rows(c)} for c in components],
        "legend": legend(components),
    }


def _component_name(info: CheckpointInfo, folder: Path) -> str:
    return info.folder.name if info.folder != folder else _class_name(folder)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _library(folder: Path) -> str:
    config = _config(folder)
    return "transformers" if "architectures" in config and "_class_name" not in config else "diffusers"


def _class_name(folder: Path) -> str:
    """The class that loads a bare model."""
    config = _config(folder)
    name = config.get("_class_name") or (config.get("architectures") or ["AutoModel"])[0]
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"
