"""An interrupted calibration goes on only with the very same inputs: everything that decides them is in a digest, or refused."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from calibration.test_calibrate import FEW, assert_equal, dit, tensors, unet
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from qdiff_diffusers import Calibration, ConfigError, RTNConfig, quantize
from qdiff_diffusers.calibration import fingerprints, layerwise, run
from qdiff_diffusers.calibration.fingerprints import NoDigestError, digest, input_facts

SCALE = 1.0


def draw(scale: float):
    """A ``run`` of the user's own, whose inputs are all ``scale``."""

    def sample(pipe, samples, generators):
        model = pipe.transformer
        model(torch.full((len(samples), 4, 8, 8), scale), torch.tensor([5]), torch.zeros(len(samples), dtype=torch.long))

    return sample


def other_draw(scale: float):
    def sample(pipe, samples, generators):
        model = pipe.transformer
        model(torch.full((len(samples), 4, 8, 8), scale), torch.tensor([6]), torch.zeros(len(samples), dtype=torch.long))

    return sample


def draw_by_global(pipe, samples, generators):
    return draw(SCALE)(pipe, samples, generators)


def facts(pipe, **settings) -> dict:
    return input_facts(pipe, {"transformer": pipe.transformer}, Calibration(**(FEW | settings)))


def other_weight(pipe) -> None:
    """Another base model of the same shapes whose sums are the same too."""
    with torch.no_grad():
        weight = pipe.transformer.transformer_blocks[1].ff.net[2].weight
        weight.copy_(weight.flip(1))


def with_lora(pipe) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.transformer)


def other_setting_of_the_model(pipe) -> None:
    pipe.transformer.register_to_config(sample_size=16)


def own_forward(pipe) -> None:
    block = pipe.transformer.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


CHANGES = {
    "another scheduler": lambda pipe: setattr(pipe, "scheduler", DPMSolverMultistepScheduler()),
    "another scheduler config": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler(beta_end=0.01)),
    "other weights of equal shapes and sums": other_weight,
    "another weight of another component": lambda pipe: pipe.vae.encoder.conv_in.bias.data.add_(1),
    "another dtype": lambda pipe: pipe.transformer.to(torch.bfloat16),
    "another image size": other_setting_of_the_model,
    "a LoRA": with_lora,
    "training mode": lambda pipe: pipe.transformer.train(),
    "a forward of one's own": own_forward,
    "another setting of the pipeline": lambda pipe: setattr(pipe, "vae_scale_factor", 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_that_gives_other_inputs_has_other_facts(change):
    pipe = dit()
    before = facts(pipe)
    assert before == facts(dit())
    CHANGES[change](pipe)
    assert facts(pipe) != before


def test_switching_a_lora_off_or_down_gives_other_facts():
    pipe = dit()
    with_lora(pipe)
    found = [facts(pipe)]
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    layer.enable_adapters(False)
    found.append(facts(pipe))
    layer.enable_adapters(True)
    assert facts(pipe) == found[0]
    layer.scaling["default"] = 0.5
    found.append(facts(pipe))
    assert not any(a == b for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_other_versions_have_other_facts(package, monkeypatch):
    pipe = dit()
    before = facts(pipe)
    version = fingerprints.version
    monkeypatch.setattr(fingerprints, "version", lambda name: "0.0" if name == package else version(name))
    assert facts(pipe)["versions"] == before["versions"] | {package: "0.0"}


def test_other_prompts_of_the_same_number_have_other_facts():
    pipe = dit()
    found = [input_facts(pipe, {}, Calibration(prompts=prompts)) for prompts in (["a cat", "a dog"], ["a cat", "a cow"])]
    assert found[0]["prompts"] != found[1]["prompts"]
    assert found[0] == input_facts(pipe, {}, Calibration(prompts=("a cat", "a dog")))


def test_where_a_pipeline_was_loaded_from_and_what_it_drew_before_does_not_matter(tmp_path):
    pipe = dit()
    pipe.labels = {}  # DiTPipeline does not store them
    pipe.vae.eval()
    before = facts(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert facts(loaded) == before
    loaded.set_progress_bar_config(disable=True)
    loaded([0], num_inference_steps=2, guidance_scale=1.0)
    assert facts(loaded) == before


@dataclass
class Size:
    width: int


class Drawer:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, pipe, samples, generators):
        return draw(self.scale)(pipe, samples, generators)

    def method(self, pipe, samples, generators):
        return draw(self.scale)(pipe, samples, generators)


def looking_up(table):
    return lambda pipe, samples, generators: table[samples[0]]


PAIRS = {
    "closure": (draw(1.0), draw(-7.0)),
    "constant in the code": (draw(1.0), other_draw(1.0)),
    "default": (lambda p, s, g, scale=1: scale, lambda p, s, g, scale=2: scale),
    "partial": (functools.partial(draw_by_global, 1), functools.partial(draw_by_global, 2)),
    "object": (Drawer(1.0), Drawer(2.0)),
    "method": (Drawer(1.0).method, Drawer(2.0).method),
    "tensor": (looking_up(torch.zeros(3)), looking_up(torch.ones(3))),
    "dtype of a tensor": (looking_up(torch.zeros(3)), looking_up(torch.zeros(3).half())),
    "array": (looking_up(np.zeros(3)), looking_up(np.ones(3))),
    "image": (looking_up(Image.new("RGB", (4, 4))), looking_up(Image.new("RGB", (4, 5)))),
    "generator": (looking_up(torch.Generator().manual_seed(1)), looking_up(torch.Generator().manual_seed(2))),
    "dataclass": (looking_up(Size(1)), looking_up(Size(2))),
    "number and truth": (looking_up(1), looking_up(True)),
    "nesting": (looking_up([[1], 2]), looking_up([[1, 2]])),
    "set": (looking_up({"a", "b"}), looking_up({"a", "c"})),
    "path": (looking_up(Path("a")), looking_up(Path("b"))),
    "scheduler": (looking_up(DDIMScheduler()), looking_up(DDIMScheduler(beta_end=0.01))),
    "helper": (lambda *_: draw(1), lambda *_: other_draw(1)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_run_functions_that_differ_in_one_thing_have_different_digests(pair):
    first, second = PAIRS[pair]
    assert digest(first) == digest(first) != digest(second)


def test_a_global_that_run_reads_through_another_function_counts(monkeypatch):
    before = digest(draw_by_global)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert digest(draw_by_global) != before


HELPERS = {
    "a module": """
import {name}_helpers
def run(*_): return {name}_helpers.draw()
""",
    "a module of a package": """
import {name}_package.inner
def run(*_): return {name}_package.inner.draw()
""",
    "an import inside": """
def run(*_):
    import {name}_helpers
    return {name}_helpers.draw()
""",
    "a name imported inside": """
def run(*_):
    from {name}_prompts import PROMPTS
    return PROMPTS
""",
    "a function inside": """
def run(*_):
    def inner():
        from {name}_helpers import draw
        return draw()
    return inner()
""",
}


@pytest.mark.parametrize("how", HELPERS)
def test_what_run_takes_from_modules_counts_however_it_is_imported(how, tmp_path, monkeypatch):
    """The prompts lie two modules away; that run itself and its helpers are the same files says nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    name = "run" + str(list(HELPERS).index(how))
    helpers = f"from {name}_prompts import PROMPTS\ndef draw(): return PROMPTS\n"
    (tmp_path / f"{name}_package").mkdir()
    for file, text in {
        f"{name}_helpers.py": helpers,
        f"{name}_package/__init__.py": "",
        f"{name}_package/inner.py": helpers,
    }.items():
        (tmp_path / file).write_text(text)
    (tmp_path / f"{name}_prompts.py").write_text("PROMPTS = ['a cat']\n")
    (tmp_path / f"{name}_user.py").write_text(HELPERS[how].format(name=name))
    user = importlib.import_module(f"{name}_user")
    before = digest(user.run)
    assert digest(user.run) == before
    user.run()
    assert digest(user.run) == before
    for module in [module for key, module in sys.modules.items() if key.startswith(name)]:
        if hasattr(module, "PROMPTS"):
            monkeypatch.setattr(module, "PROMPTS", ["a dog"])
    assert digest(user.run) != before


def test_a_setting_of_a_module_that_was_changed_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "settings_of_a_run.py").write_text("SCALE = 1\n")
    settings = importlib.import_module("settings_of_a_run")
    run = looking_up(settings)
    before = digest(run)
    settings.SCALE = 2
    assert digest(run) != before


class Slotted:
    __slots__ = ("scale",)


class Own(Slotted):
    pass


class Prompts(list):
    pass


class Settings(dict):
    pass


@pytest.mark.parametrize("kind", [Own, Prompts, Settings])
def test_attributes_count_wherever_an_object_keeps_them(kind):
    first, second = kind(), kind()
    first.scale, second.scale = 1, 2
    assert digest(looking_up(first)) == digest(looking_up(first)) != digest(looking_up(second))


def test_run_functions_made_again_have_the_same_digest():
    assert digest(draw(1.0)) == digest(draw(1.0))
    assert digest(Drawer(1.0)) == digest(Drawer(1.0))
    assert digest(looking_up({"b": 1, "a": 2})) == digest(looking_up({"a": 2, "b": 1}))


def test_functions_and_lists_that_refer_to_themselves_have_a_digest():
    own: list = [1]
    own.append(own)

    def again(pipe, samples, generators):
        return again(pipe, own, generators)

    assert digest(again) == digest(again)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(iter([1]), "list_iterator"), (object(), "object"), (sys.stderr, ""), (torch.empty(2, device="meta"), "meta device")],
)
def test_a_run_that_holds_what_cannot_be_compared_is_refused_by_name(value, kind):
    with pytest.raises(NoDigestError, match=f"`table`, which run refers to, is .*{kind}"):
        digest(looking_up(value), "run")


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import json
from calibration.test_fingerprints import PAIRS, digest, dit, facts, unet
from qdiff_diffusers.calibration.fingerprints import input_facts
from qdiff_diffusers import Calibration
bare = unet()
print(json.dumps([facts(dit()), input_facts(bare, {{"": bare}}, Calibration()), [digest(first) for first, _ in PAIRS.values()]]))
"""


@pytest.mark.serial
def test_digests_are_the_same_in_every_process():
    command = [sys.executable, "-c", WORKER.format(tests=str(Path(__file__).parents[1]))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, **pipes) for seed in ("1", "2")]
    found = []
    for process in started:
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(told.splitlines()[-1]))
    assert found[0] == found[1]
    assert found[0][0] == json.loads(json.dumps(facts(dit())))


def test_tokenizers_count_by_what_they_do(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def tokenizer(words, **settings):
        rules = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=rules, unk_token=words[0], pad_token=words[0], **settings)

    one = tokenizer(["?", "cat", "dog"])
    before = digest(one)
    one(["cat dog"], padding="max_length", max_length=7, truncation=True)  # which the tokenizer remembers
    assert digest(one) == before == digest(tokenizer(["?", "cat", "dog"]))
    assert before != digest(tokenizer(["?", "dog", "cat"])) and before != digest(
        tokenizer(["?", "cat", "dog"], padding_side="left")
    )


def interrupted_after(count, monkeypatch, pipe, folder, calibration) -> None:
    """A calibration that is stopped when ``count`` layers are done."""
    original, done = layerwise.quantize_weight, itertools.count()

    def stopping(*args, **kwargs):
        if next(done) == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layerwise, "quantize_weight", stopping)
        quantize(pipe, RTNConfig(bits=2), folder, calibration=calibration)


def small() -> object:
    """With few layers, so that a calibration is quick."""
    torch.manual_seed(0)
    pipe = dit()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    return pipe


OTHERS = {
    "run": (small, {"run": draw(1.0)}, {"run": draw(-7.0)}),
    "run_key": (small, {"run": draw(1.0), "run_key": "a"}, {"run": draw(-7.0), "run_key": "b"}),
    "class_labels": (small, FEW, FEW | {"class_labels": [1, 0]}),
    "guidance_scale": (small, FEW, FEW | {"guidance_scale": 0.5}),
    "seed": (small, FEW, FEW | {"seed": 1}),
    "scheduler": (
        unet,
        {"class_labels": [0], "steps": 2},
        {"class_labels": [0], "steps": 2, "scheduler": DDIMScheduler(beta_end=0.5)},
    ),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_calibration_begun_with_other_inputs_is_begun_anew_and_says_so(change, tmp_path, monkeypatch):
    make, first, second = OTHERS[change]
    first, second = ({"samples": 2, "steps": 2} | settings for settings in (first, second))
    said: list[str] = []
    monkeypatch.setattr(run.logger, "warning", lambda text, *values: said.append(text % values))
    interrupted_after(3, monkeypatch, make(), tmp_path / "out", first)
    found, alone = make(), make()
    quantize(found, RTNConfig(bits=2), tmp_path / "out", calibration=second)
    assert len(said) == 1 and said[0].startswith("Starting anew") and change.partition("_key")[0] in said[0]
    quantize(alone, RTNConfig(bits=2), calibration=second)
    assert_equal(*(tensors(getattr(pipe, "transformer", pipe)) for pipe in (found, alone)))


def test_a_workspace_of_ones_own_with_other_inputs_is_refused_and_kept(tmp_path, monkeypatch):
    work = tmp_path / "work"
    interrupted_after(3, monkeypatch, small(), None, {"run": draw(1.0), "samples": 2, "workspace": work})
    before = sorted(path for path in work.rglob("*"))
    with pytest.raises(ConfigError, match=r"work of another calibration \(other run\)"):
        quantize(small(), RTNConfig(bits=2), calibration={"run": draw(-7.0), "samples": 2, "workspace": work})
    with pytest.raises(ConfigError, match=r"other transformer\)"):
        pipe = small()
        other = pipe.transformer.transformer_blocks[0].ff.net[2].weight.data
        other.copy_(other.flip(1))
        quantize(pipe, RTNConfig(bits=2), calibration={"run": draw(1.0), "samples": 2, "workspace": work})
    assert sorted(path for path in work.rglob("*")) == before
    quantize(small(), RTNConfig(bits=2), calibration={"run": draw(1.0), "samples": 2, "workspace": work})
    assert not work.exists()


def test_a_run_that_cannot_be_recognised_is_never_resumed(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(run.logger, "warning", lambda text, *values: said.append(text % values))
    scales = iter([2.0] * 100)

    def sample(pipe, samples, generators):
        return draw(next(scales))(pipe, samples, generators)

    calibration = {"run": sample, "samples": 2}
    interrupted_after(3, monkeypatch, small(), tmp_path / "out", calibration)
    assert not list(tmp_path.iterdir())
    assert len(said) == 1 and "cannot be resumed: `scales`, which run refers to, is a list_iterator" in said[0]
    with pytest.raises(ConfigError, match="give run_key"):
        quantize(small(), RTNConfig(bits=2), calibration=calibration | {"workspace": tmp_path / "work"})
    interrupted_after(3, monkeypatch, small(), tmp_path / "out", calibration | {"run_key": "twos"})
    quantize(small(), RTNConfig(bits=2), tmp_path / "out", calibration=calibration | {"run_key": "twos"})
    assert said[-1].startswith("Resuming")


def test_a_workspace_whose_description_was_cut_off_is_not_resumed(tmp_path, monkeypatch):
    interrupted_after(3, monkeypatch, small(), tmp_path / "out", FEW)
    marker = tmp_path / ".out-calibration" / "run.json"
    marker.write_text(marker.read_text()[:20])
    found, alone = small(), small()
    quantize(found, RTNConfig(bits=2), tmp_path / "out", calibration=FEW)
    quantize(alone, RTNConfig(bits=2), calibration=FEW)
    assert_equal(tensors(found.transformer), tensors(alone.transformer))


@pytest.mark.parametrize("settings", [{"run_key": "a"}, {"run": draw(1.0), "run_key": ""}, {"run": draw(1.0), "run_key": 3}])
def test_a_key_without_a_run_or_that_is_no_text_is_refused(settings):
    with pytest.raises(ConfigError, match="run_key names what `run` draws"):
        Calibration(**settings)


def test_models_of_all_families_have_a_digest():
    for name in tiny_models.MODELS:
        model = tiny_models.make(name)
        assert digest(model) == digest(tiny_models.make(name)) != digest(tiny_models.make(name, seed=1))
