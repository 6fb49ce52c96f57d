"""The nodes in German and French: every text of a schema has a translation, and no translation is left over."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qdiff_diffusers.methods import METHODS

ROOT = Path(__file__).parents[1]
LANGUAGES = ("de", "fr")


class Texts(NamedTuple):
    """What a node's schema says in English, read from its source: ComfyUI, which the schema needs, may not be installed."""

    description: str
    inputs: dict[str, str | None]  # names and tooltips; "" for a tooltip that is made at run time
    outputs: set[str]  # places of the outputs with a name of their own


def schema_texts() -> dict[str, Texts]:
    """The texts of every node by its id."""
    found = {}
    for file in sorted((ROOT / "comfy_nodes" / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                said = {keyword.arg: keyword.value for keyword in call.keywords}
                inputs = {text(entry.args[0]): text(keywords(entry).get("tooltip")) for entry in said["inputs"].elts}
                outputs = {str(i) for i, entry in enumerate(said["outputs"].elts) if "display_name" in keywords(entry)}
                found[text(said["node_id"])] = Texts(text(said["description"]), inputs, outputs)
    return found


def keywords(call: Any) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def text(node: ast.expr | None) -> str | None:
    return None if node is None else node.value if isinstance(node, ast.Constant) else ""


def translation(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_a_node_is_translated_and_no_other(language):
    schemas, words = schema_texts(), translation(language)
    assert set(words) == set(schemas) and len(schemas) == 9
    for node, schema in schemas.items():
        said = words[node]
        assert set(said) - {"outputs"} == {"display_name", "description", "inputs"}, node
        assert said["display_name"] and said["description"] and said["description"] != schema.description, node
        assert set(said["inputs"]) == set(schema.inputs) and set(said.get("outputs", {})) == schema.outputs, node
        for name, entry in said["inputs"].items():
            tooltip = schema.inputs[name]
            assert entry["name"] and ("tooltip" in entry) == (tooltip is not None), (node, name)
            assert tooltip is None or (entry["tooltip"] and entry["tooltip"] != tooltip), (node, name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_method_is_explained(language):
    tooltip = translation(language)["QDiffQuantizeModel"]["inputs"]["method"]["tooltip"]
    own = [method.name for method in METHODS.values() if type(method).__module__.startswith("qdiff_diffusers.")]
    assert own and all(f"{name}{' ' if language == 'fr' else ''}:" in tooltip for name in own)
