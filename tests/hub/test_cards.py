"""Model cards: complete, true to the checkpoint, and valid by huggingface_hub's and the Hub's own rules."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import DiTTransformer2DModel
from hub.card_rules import card_problems
from huggingface_hub import ModelCard
from PIL import Image

from qdiff_diffusers import AQConfig, CheckpointError, FPConfig, RTNConfig, SVDQuantConfig, VQConfig, inspect_checkpoint
from qdiff_diffusers.checkpoint.provenance import local_card, task_of
from qdiff_diffusers.hub import Result, Results, read_results, render_card, write_card, write_results
from qdiff_diffusers.hub.contents import layer_kind

CONFIGS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1, overrides={"attn1.to_q": RTNConfig(bits=8), "ff": None}),
    "fp": lambda: FPConfig(weight_format="nvfp4", activations="int8"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4),
}
PAPERS = {"aq": "AQUATIC", "vq": "VQ4DiT", "fp": "Low-Bitwidth Floating Point", "svdquant": "SVDQuant: Absorbing", "rtn": "qdiff"}
RESULTS = Results(
    [Result("psnr", "PSNR", 31.25, "dB"), Result("frechet", "Frechet distance", 4.5, baseline=4.25)],
    "someone/pictures",
    "Pictures | of things",
    "20 images, 20 steps.",
    {"command": "qdiff demo", "machine": "", "date": "2026-01-31"},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    tiny_models.make("dit").save_pretrained(root / "dense")
    for method, make in CONFIGS.items():
        model = DiTTransformer2DModel.from_pretrained(root / "dense", quantization_config=make(), dtype=torch.bfloat16)
        model.save_pretrained(root / method)
    return {method: root / method for method in CONFIGS}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["fp"], tmp_path / "model"))


def provenance(folder: Path, **entries: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].setdefault("provenance", {}).update(entries)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", CONFIGS)
def test_every_methods_card_is_complete_and_valid(method, folders):
    card = render_card(folders[method], "someone/tiny")
    assert card_problems(str(card)) == []
    again = ModelCard(str(card))
    info = inspect_checkpoint(folders[method])
    data = again.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert {"qdiff", method, "quantized"} <= set(data["tags"])
    assert data["quantization"]["bits_per_weight"] == round(info.bits_per_weight, 3)
    assert data["quantization"]["packed_bytes"] == info.packed_bytes
    assert "base_model" not in data and "model-index" not in data and "license" not in data
    headings = re.findall(r"^## (.*)", again.text, re.MULTILINE)
    assert headings == ["Load it", "What is inside", "Method", "Limitations", "Citation"]
    assert PAPERS[method] in again.text and f"**{info.bits_per_weight:.2f} bits per weight**" in again.text
    assert "\n\n\n" not in again.text and "None" not in again.text and "{" + "{" not in again.text
    assert 'DiTTransformer2DModel.from_pretrained("someone/tiny", dtype=torch.bfloat16)' in again.text


def test_tables_are_well_formed(folders):
    for folder in folders.values():
        rows = [line for line in str(render_card(folder, "a/b")).splitlines() if line.startswith("|")]
        assert rows and all(row.endswith("|") for row in rows)
        for row, following in itertools.pairwise(rows):
            if set(following) <= set("|-: "):
                assert row.count("|") == following.count("|")


def test_the_table_adds_up_by_kind_of_layer(folders):
    text = str(render_card(folders["rtn"], "a/b"))
    kinds = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|(?:[^|]*\|){5}$", text, re.MULTILINE))
    total = int(kinds.pop("**all**"))
    assert total == len(inspect_checkpoint(folders["rtn"]).layers) == sum(map(int, kinds.values()))
    assert {"attention, query key value", "attention, output", "feed-forward"} <= kinds.keys()


@pytest.mark.parametrize("method", CONFIGS)
def test_every_short_name_in_the_table_is_explained_below_it(method, folders):
    text = render_card(folders[method], "a/b").text
    formats = " ".join(re.findall(r"^\|[^|]+\| \d+ \| ([^|]+) \|", text, re.MULTILINE))
    legend = re.search(r"^(`.*) Weight error: ", text, re.MULTILINE)[1]
    explained = re.sub(r"\d+", "0", " ".join(re.findall(r"`([^`]+)`: ", legend)))
    used = {re.sub(r"\d+", "0", name) for name in re.findall(r"rank \d+|rotated \d+|per row|g\d+|smoothed|\d+x\d+ d\d+", formats)}
    assert used and all(name in explained for name in used)


def test_the_size_on_disk_is_compared_with_that_of_16_bits(folders):
    text = render_card(folders["rtn"], "a/b").text
    on_disk, dense = re.search(r"^\| on disk with those \| ([\d.]+) KB \(16-bit: ([\d.]+) KB\) \|$", text, re.MULTILINE).groups()
    file = next(folders["rtn"].glob("*.safetensors"))
    assert abs(1000 * float(on_disk) - file.stat().st_size) < 60
    model = tiny_models.make("dit").half()
    assert abs(1000 * float(dense) - sum(t.nbytes for t in model.state_dict().values())) < 0.1 * 1000 * float(dense)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.3.attn1.to_q", "attention, query key value"),
        ("transformer_blocks.3.attn.add_k_proj", "attention, query key value"),
        ("transformer_blocks.3.attn.to_add_out", "attention, output"),
        ("transformer_blocks.3.ff.net.0.proj", "feed-forward"),
        ("transformer_blocks.3.ff_context.net.2", "feed-forward"),
        ("transformer_blocks.3.norm1.linear", "modulation (adaLN)"),
        ("transformer_blocks.3.norm1_context.linear", "modulation (adaLN)"),
        ("single_transformer_blocks.12.proj_mlp", "feed-forward"),
        ("blocks.0.attn2.to_out.0", "attention, output"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention, query key value"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "feed-forward"),
        ("text_model.encoder.layers.0.self_attn.out_proj", "attention, output"),
        ("down_blocks.0.resnets.1.conv1", "convolution"),
        ("x_embedder", "embedding and projection"),
        ("strange", "other"),
    ],
)
def test_kinds_of_layers(name, kind):
    assert layer_kind(name) == kind


def test_the_base_model_and_its_license_are_inherited(folder):
    provenance(folder, base_model="black-forest-labs/FLUX.1-dev")
    known = {"license": "other", "license_name": "flux-dev", "license_link": "LICENSE.md", "pipeline_tag": "text-to-image"}
    card = render_card(folder, "someone/tiny", known)
    assert card_problems(str(card)) == []
    data = card.data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-dev" and data["base_model_relation"] == "quantized"
    assert {key: data[key] for key in known} == known
    assert "License: flux-dev, LICENSE.md." in card.text and "huggingface.co/black-forest-labs/FLUX.1-dev" in card.text


def test_what_the_checkpoint_records_goes_before_the_base_models_card(folder):
    provenance(folder, license="mit")
    assert render_card(folder, "a/b", {"license": "other"}).data.license == "mit"


@pytest.mark.parametrize("base", ["not a name", "../../x", 7, ["a/b"], "a/b\nlicense: mit"])
def test_a_base_model_that_is_no_name_is_left_out(folder, base):
    provenance(folder, base_model=base)
    data = render_card(folder, "a/b").data.to_dict()
    assert "base_model" not in data and "license" not in data


def test_results_become_a_table_and_the_model_index(folder):
    write_results(folder, RESULTS)
    card = render_card(folder, "someone/tiny")
    assert card_problems(str(card)) == []
    assert "| PSNR (dB) | 31.25 | – |" in card.text and "| Frechet distance | 4.5 | 4.25 |" in card.text
    assert "20 images, 20 steps." in card.text and "command: `qdiff demo`" in card.text
    results = ModelCard(str(card)).data.eval_results
    assert [(r.metric_type, r.metric_value) for r in results] == [("psnr", 31.25), ("frechet", 4.5)]
    assert {(r.dataset_type, r.dataset_name) for r in results} == {("someone/pictures", "Pictures / of things")}


@pytest.mark.parametrize(
    ("value", "margin", "text"),
    [
        (25.823, 0.78, "25.82 ± 0.78"),
        (2.868, 1.82, "2.9 ± 1.8"),
        (0.99071, 0.0043, "0.9907 ± 0.0043"),
        (1, 0, "1"),
        (94.0, None, "94"),
    ],
)
def test_a_value_is_shown_as_far_as_it_is_known(value, margin, text):
    assert Result("psnr", "PSNR", value, margin=margin).text == text


def test_results_survive_writing_and_reading(folder):
    write_results(folder, RESULTS)
    read = read_results(folder)
    assert read.results == RESULTS.results and read.protocol == RESULTS.protocol


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("protocol"), "protocol"),
        (lambda d: d.update(results=[]), "at least one result"),
        (lambda d: d.pop("dataset"), "dataset"),
        (lambda d: d["results"][0].update(value=float("nan")), "finite"),
        (lambda d: d["results"][0].update(value=True), "finite"),
        (lambda d: d["results"][0].update(colour=1), "colour"),
        (lambda d: d.update(results="all good"), "qdiff_results.json"),
        (lambda d: d["results"][0].update(metric=3), "metric"),
    ],
    ids=range(8),
)
def test_malformed_results_are_refused_by_name(folder, change, named):
    write_results(folder, RESULTS)
    data = json.loads((folder / "qdiff_results.json").read_text())
    change(data)
    (folder / "qdiff_results.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=named):
        render_card(folder, "a/b")


def test_samples_stand_beside_those_of_16_bits(folder):
    (folder / "samples").mkdir()
    for name in ("red_fox", "red_fox-16bit", "grid"):
        Image.new("RGB", (4, 4)).save(folder / "samples" / f"{name}.png")
    text = render_card(folder, "a/b").text
    assert "| 16 bits | ![red fox, 16 bits](samples/red_fox-16bit.png) |" in text
    assert "| this checkpoint | ![red fox, quantized](samples/red_fox.png) |" in text
    assert "![grid](samples/grid.png)" in text


def test_a_card_of_ours_is_written_anew_and_one_by_hand_stays(folder):
    write_card(folder, "someone/first")
    write_card(folder, "someone/second")
    assert "someone/second" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("By hand.")
    write_card(folder, "someone/third")
    assert (folder / "README.md").read_text() == "By hand."


def test_a_text_encoder_is_loaded_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "dense")
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "dense", quantization_config=RTNConfig(bits=4))
    model.save_pretrained(tmp_path / "packed")
    card = render_card(tmp_path / "packed", "someone/t5")
    assert card.data.library_name == "transformers"
    assert 'from transformers import T5EncoderModel\nmodel = T5EncoderModel.from_pretrained("someone/t5"' in card.text
    assert card.data.pipeline_tag == "feature-extraction" and card_problems(str(card)) == []


@pytest.mark.parametrize(
    ("index", "task"),
    [
        ({"_class_name": "FluxPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}, "text-to-image"),
        ({"_class_name": "FluxImg2ImgPipeline", "tokenizer": ["a", "b"]}, "image-to-image"),
        ({"_class_name": "WanPipeline", "tokenizer": ["a", "b"]}, "text-to-video"),
        ({"_class_name": "WanImageToVideoPipeline", "tokenizer": ["a", "b"]}, "image-to-video"),
        ({"_class_name": "StableAudioPipeline"}, "text-to-audio"),
        ({"_class_name": "DiTPipeline"}, "unconditional-image-generation"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "unconditional-image-generation"),
    ],
)
def test_the_task_follows_from_the_pipeline(tmp_path, index, task):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert task_of(tmp_path) == task


def test_the_license_of_a_local_model_travels_with_the_checkpoint(folders, tmp_path):
    dense = Path(shutil.copytree(folders["rtn"].parent / "dense", tmp_path / "dense"))
    (dense / "README.md").write_text("---\nlicense: other\nlicense_name: a-name\nlicense_link: https://example.org\n---\n")
    DiTTransformer2DModel.from_pretrained(dense, quantization_config=RTNConfig(bits=4)).save_pretrained(tmp_path / "packed")
    card = render_card(tmp_path / "packed", "a/b")
    assert (card.data.license, card.data.license_name) == ("other", "a-name") and card_problems(str(card)) == []


def test_the_card_beside_a_checkpoint_or_its_pipeline_tells_the_license(tmp_path):
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    card = "---\nlicense: openrail++\nlanguage: en\npipeline_tag: text-to-image\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert local_card(file) == {}, "the README of some other folder"
    (tmp_path / "model_index.json").write_text("{}")
    assert local_card(file) == {"license": "openrail++", "pipeline_tag": "text-to-image"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert local_card(file) == {}
