"""The Hub's rules for the metadata of a model card, as its documentation states them (docs/hub, "model cards")."""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENSES = {
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0",
    "bsd-3-clause", "gpl-3.0", "agpl-3.0", "other", "unknown",
}  # fmt: skip
TASKS = {
    "text-to-image", "image-to-image", "text-to-video", "image-to-video", "text-to-audio", "unconditional-image-generation",
    "feature-extraction", "text-generation", "image-text-to-text", "text-to-3d", "image-to-3d", "text-to-speech",
}  # fmt: skip
RELATIONS = {"quantized", "finetune", "adapter", "merge"}
NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def card_problems(content: str) -> list[str]:
    """What the Hub would object to; empty for a card that it takes."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return []  # a card without metadata is a warning only
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    problems = [f'"{key}" must be a string' for key in ("library_name", "pipeline_tag", "license") if not _text(data.get(key, ""))]
    if data.get("license", "mit") not in LICENSES:
        problems.append(f'"license" {data["license"]} is not one of the known identifiers')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license_name" is required if "license" is "other"')
    if data.get("pipeline_tag", "text-to-image") not in TASKS:
        problems.append(f'"pipeline_tag" {data["pipeline_tag"]} is not a known task')
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not (_text(base) and NAME.fullmatch(base)):
            problems.append(f'"base_model" {base!r} is not the name of a model')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        problems.append('"base_model_relation" is unknown')
    if not (isinstance(data.get("tags", []), list) and all(_text(tag) for tag in data.get("tags", []))):
        problems.append('"tags" must be a list of strings')
    return problems + _index_problems(data.get("model-index", []))


def _index_problems(index: Any) -> list[str]:
    problems = []
    for model in index:
        if not _text(model.get("name")):
            problems.append('"model-index[].name" is required')
        for result in model.get("results", ()):
            task, dataset, metrics = result.get("task", {}), result.get("dataset", {}), result.get("metrics", ())
            if task.get("type") not in TASKS:
                problems.append(f'"model-index[].results[].task.type" {task.get("type")!r} is not a known task')
            if not (_text(dataset.get("type")) and _text(dataset.get("name"))):
                problems.append('"model-index[].results[].dataset" needs a type and a name')
            for metric in metrics:
                if not _text(metric.get("type")) or not isinstance(metric.get("value"), int | float | str):
                    problems.append('"model-index[].results[].metrics[]" needs a type and a value')
            if not metrics:
                problems.append('"model-index[].results[].metrics" is required')
    return problems


def _text(value: Any) -> bool:
    return isinstance(value, str)
