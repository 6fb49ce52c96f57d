"""A method of somebody else's: one file and an entry point, and it does all that ours do."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_models
import torch
from diffusers import DiTTransformer2DModel

from qdiff_diffusers import ConfigError, QDiffConfig, SVDQuantConfig, inspect_checkpoint
from qdiff_diffusers.config import METHODS as CONFIGS
from qdiff_diffusers.evaluation.plot import quality_plot
from qdiff_diffusers.evaluation.report import render_report
from qdiff_diffusers.hub import render_card
from qdiff_diffusers.methods import METHODS
from qdiff_diffusers.methods.base import default_first

ROOT = Path(__file__).parents[2]
OURS = ("aq", "vq", "fp", "svdquant", "rtn")
METHOD = '''
"""Signs and a scale per row: all that a method needs, in one file."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from qdiff_diffusers import Method, QDiffConfig, register_method
from qdiff_diffusers.formats import IntegerFormat
from qdiff_diffusers.methods import Option
from qdiff_diffusers.methods.fields import Between


@dataclass(repr=False)
class SignsConfig(QDiffConfig):
    """A sign per weight, and the mean magnitude of each group."""

    loudness: Annotated[int, Between(1, 9)] = 1

    method_name: ClassVar[str] = "signs"
    bit_choices: ClassVar[tuple[float, ...]] = (1,)
    activation_choices: ClassVar[tuple[str, ...]] = ("int8",)


@register_method
class Signs(Method[SignsConfig]):
    config = SignsConfig
    label = "Signs"
    title = "signs of weights"
    summary = "the sign of each weight and a scale per row"
    colour = "#123456"
    suggested_bits = 1
    options = (Option("loudness", 1, 1, 9, "How loud it is."),)

    def formats(self, config, shape):
        return [IntegerFormat(1, "row", symmetric=False)]

    def quantize(self, matrix, config, seed):
        scales = matrix.abs().mean(1, keepdim=True)
        weight_format = self.formats(config, matrix.shape)[0]
        return weight_format, weight_format.pack((matrix > 0).byte(), 2 * scales, -scales)
'''


def install(folder: Path, entry: str = "signs = qdiff_test_signs", code: str = METHOD, module: str = "qdiff_test_signs") -> None:
    """What ``pip install`` leaves of a package."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qdiff.methods]\n{entry}\n")


@pytest.fixture
def forgetting(monkeypatch):
    """The registry as it is before it looks for packages, and as it was afterwards."""
    known = dict(METHODS._methods)
    METHODS._complete = False
    yield monkeypatch
    METHODS._methods.clear()
    METHODS._methods.update(known)
    for name in [name for name in sys.modules if name.startswith("qdiff_test_")]:
        del sys.modules[name]


@pytest.fixture
def signs(forgetting, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder)
    forgetting.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def test_one_file_and_an_entry_point_make_a_method(signs, tmp_path):
    """It quantizes while loading, is saved, loads again to the same bits, and gets its card."""
    tiny_models.make("dit").save_pretrained(tmp_path / "dense")
    config = QDiffConfig(method="signs", loudness=2, activations="int8")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny_models.run(model, "dit"), tiny_models.run(again, "dit"))
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (stored["method"], stored["loudness"]) == ("signs", 2)
    assert {layer.method for layer in inspect_checkpoint(tmp_path / "packed").layers} == {"signs"}
    card = str(render_card(tmp_path / "packed", "me/dit-signs"))
    assert "signs of weights" in card and "the sign of each weight and a scale per row" in card and "{{" not in card
    assert "## Citation" not in card


def test_its_settings_are_checked_like_ours(signs):
    for settings, named in (
        ({"loudness": 10}, "loudness must be an integer from 1 to 9, got 10"),
        ({"bits": 2}, "bits must be one of 1"),
    ):
        with pytest.raises(ConfigError, match=named):
            QDiffConfig(method="signs", **settings)
    with pytest.raises(ConfigError, match="one of aq, vq, fp, rtn, svdquant, signs, got 'sings'"):
        QDiffConfig(method="sings")


def test_it_may_stand_among_overrides_and_in_mixed_precision(signs):
    config = SVDQuantConfig(bits=4, overrides={"ff": {"method": "signs", "loudness": 3}})
    assert type(config.config_for("ff.net")).__name__ == "SignsConfig"
    assert QDiffConfig.from_dict(config.to_dict()) == config
    assert QDiffConfig(method="signs", bits=1).alternatives() == [{"bits": 1}]
    assert METHODS["signs"].stored_bits(config.config_for("ff.net"), (64, 64)) == 1.5


def test_it_gets_a_row_in_reports_and_a_line_in_plots(signs):
    row = {"name": "Signs 1-bit", "method": "signs", "nominal_bits": 1, "bits_per_weight": 1.1, "psnr": 12.0, "ssim": 0.5}
    row |= dict.fromkeys(("size_bytes", "reload_seconds", "load_seconds", "frechet", "accuracy", "seconds_per_image"), 1.0)
    page = render_report([row], run_facts(), b"")
    assert "Signs" in page and "the sign of each weight and a scale per row" in page and "#123456" in page
    assert "#123456" in (quality_plot({"signs": [(1.0, 12.0), (2.0, 13.0)]}) or "")


def run_facts():
    """Whatever the page asks about a run."""

    class Facts(dict):
        def __missing__(self, key):
            return 1

    return Facts()


def test_it_is_offered_by_interfaces(signs):
    assert [method.name for method in default_first()] == ["svdquant", "aq", "vq", "fp", "rtn", "signs"]
    assert CONFIGS["signs"] is METHODS["signs"].config and "signs" in CONFIGS and len(CONFIGS) == 6


def test_the_command_line_names_it_in_help_and_errors(signs):
    environment = os.environ | {"PYTHONPATH": str(signs), "COLUMNS": "300", "TERMINAL_WIDTH": "300"}

    def qdiff(*words):
        command = [sys.executable, "-m", "qdiff_diffusers.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    said = qdiff("quantize", "--help").stdout
    assert "signs: the sign of each weight and a scale per row" in said and "signs: 1" in said
    assert "rounding (svdquant, fp, rtn, signs only)" in said and "Rank of the low-rank branch (svdquant)" in said
    wrong = qdiff("quantize", "nowhere", "-o", "out", "-m", "sings")
    assert wrong.returncode == 2 and "signs" in wrong.stderr


@pytest.mark.parametrize(
    ("entry", "code", "why"),
    [
        ("broken = qdiff_test_broken", "raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("broken = qdiff_test_nowhere", "", "ModuleNotFoundError"),
        ("broken = qdiff_test_broken:thing", "thing = 7", "must be a Method"),
        ("broken = qdiff_test_broken", "", "must be a Method"),
        ("broken = qdiff_test_broken", METHOD.replace('"signs"', '"aq"'), "there is a method 'aq' already"),
        ("broken = qdiff_test_broken", METHOD.replace('"signs"', '""'), "must be a name"),
    ],
)
def test_a_package_that_fails_fails_alone_and_is_named(entry, code, why, signs, caplog):
    install(signs, entry, code, "qdiff_test_broken")
    importlib.invalidate_caches()
    assert set(METHODS) == {*OURS, "signs"}
    assert set(METHODS) == {*OURS, "signs"}
    warnings = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert len(warnings) == 1 and "'broken'" in warnings[0] and why in warnings[0]


def test_a_config_without_a_method_is_refused_by_name(forgetting):
    @dataclass(repr=False)
    class Lonely(QDiffConfig):
        method_name: ClassVar[str] = "lonely"

    with pytest.raises(ConfigError, match="no method 'lonely' is registered for Lonely"):
        Lonely()


def sources():
    return [path for folder in ("qdiff_diffusers", "comfy_nodes") for path in sorted((ROOT / folder).rglob("*.py"))]


def config_names():
    return {config.__name__ for name, config in CONFIGS.items() if name in OURS}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_a_methods_file_asks_which_method_it_is(path):
    """No ``isinstance(config, SomeConfig)`` or ``type(config) is SomeConfig``, and no table that restates what methods say."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {f"{name}.py" for name in OURS} if path.parent.name == "methods" else set()
    if path.name in own:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = {n.id for argument in node.args[1:] for n in ast.walk(argument) if isinstance(n, ast.Name)}
            assert not asked & config_names(), f"line {node.lineno} asks whether a config is one of {asked & config_names()}"
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot | ast.Eq) for op in node.ops):
            asked = {n.id for n in (node.left, *node.comparators) if isinstance(n, ast.Name)}
            assert not asked & config_names(), f"line {node.lineno} compares a class with {asked & config_names()}"
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            assert len(keys & set(OURS)) < 3, f"line {node.lineno} is a table by method; let the methods say it"
        exported = path == ROOT / "qdiff_diffusers" / "methods" / "__init__.py"  # the modules' names, which are the methods'
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and not exported:
            items = {item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)}
            assert len(items & set(OURS)) < 3, f"line {node.lineno} lists the methods; ask the registry"
