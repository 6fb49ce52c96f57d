"""Share and load by name, against a Hub on this machine."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from hub.client import Client, refused, snapshot
from PIL import Image

from qdiff_diffusers import FPConfig, inspect_checkpoint
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.sampling import sample
from qdiff_diffusers.hub import Result, Results, write_results

WEIGHTS = "diffusion_pytorch_model.safetensors"
UPLOAD = "^PUT /_storage/"
SAMPLE = """
from qdiff_diffusers.evaluation.sampling import sample
images = sample(pipe, [3], [7], steps=2)
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """The demo pipeline, quantized, with results and samples beside it."""
    folder = tmp_path_factory.mktemp("pipeline") / "demo-fp4"
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": FPConfig(bits=4)})
    pipe = DiffusionPipeline.from_pretrained(DEMO_MODEL, quantization_config=quantization, dtype=torch.float32)
    pipe.save_pretrained(folder)
    results = [Result("psnr", "PSNR", 39.5, "dB"), Result("frechet", "Frechet distance", 4.07, baseline=4.16)]
    write_results(folder, Results(results, "zalando-datasets/fashion_mnist", "Fashion-MNIST", "20 images.", {}))
    (folder / "samples").mkdir()
    for name in ("coat", "coat-16bit"):
        Image.new("L", (8, 8)).save(folder / "samples" / f"{name}.png")
    torch.save(sample(pipe, [3], [7], steps=2), folder.parent / "images.pt")
    return folder


def test_quantize_push_and_load_by_name_in_a_fresh_process(hub, client, pipeline, tmp_path):
    before = snapshot(pipeline)
    done = client.qdiff("push", pipeline, "someone/demo-fp4", "--private", "-m", "Four bits")
    assert done.code == 0, done.err
    assert snapshot(pipeline) == before
    commit = re.search(r'revision="(\w{40})"', done.out)[1]
    repo = hub.repos["someone/demo-fp4"]
    assert repo.private and repo.titles[commit] == "Four bits" and len(repo.commits) == 2
    assert hub.files("someone/demo-fp4").keys() == before.keys() | {"README.md"}
    assert {"/api/validate-yaml", "/api/repos/create"} < {line.split()[1] for line in hub.log}
    repo.commit("main", {}, "someone empties the branch later")

    expected = str(pipeline.parent / "images.pt")
    with Client(hub.url, tmp_path) as fresh:
        load = f"""
        import torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained("someone/demo-fp4", revision={commit!r}, dtype=torch.float32)
        """
        assert fresh.run(load).code == 0
        done = fresh.run(f"{SAMPLE}\nprint(torch.equal(images, torch.load({expected!r})))")
        assert done.out == "True\n", done.err
        assert hub.requests("^GET /_storage/") and not hub.requests("README")
        done = fresh.qdiff("inspect", "someone/demo-fp4", "--revision", commit)
        assert done.code == 0 and "packed layers" in done.out, done.err
        assert "revision" in fresh.qdiff("inspect", "someone/demo-fp4", "--revision", "no-such").err.lower()


def test_the_three_lines_of_a_card_load_the_model(hub, client, pipeline):
    assert client.qdiff("push", pipeline, "three-lines").code == 0
    card = hub.files("someone/three-lines")["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(snippet.strip().splitlines()) == 3 and '"someone/three-lines"' in snippet
    done = client.run(f"{snippet}\nprint(type(pipe).__name__, type(pipe.transformer.transformer_blocks[0].attn1.to_q).__name__)")
    assert done.out == "DiTPipeline QDiffLinear\n", done.err
    if "https://huggingface.co/api" in inspect.getsource(huggingface_hub.repocard):
        return  # before 1.34 it validates cards at the real Hub, wherever HF_ENDPOINT points
    validate = "import huggingface_hub; huggingface_hub.ModelCard.load('someone/three-lines').validate()"
    assert client.run(validate).code == 0


def test_the_push_of_a_bare_model_and_its_card(hub, client, model):
    done = client.qdiff("push", model, "someone/bare")
    assert done.code == 0, done.err
    card = hub.files("someone/bare")["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    done = client.run(f"{snippet}\nprint(type(model).__name__, len(model.config.quantization_config.layers))")
    assert done.out.split() == ["DiTTransformer2DModel", str(len(inspect_checkpoint(model).layers))], done.err


def test_push_to_hub_of_models_and_pipelines_writes_the_same_card(hub, client, pipeline):
    done = client.run(
        f"""
        import qdiff_diffusers
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({str(pipeline)!r})
        pipe.push_to_hub("someone/by-method")
        pipe.transformer.push_to_hub("someone/by-model")
        """
    )
    assert done.code == 0, done.err
    for name, loader in (("by-method", "DiffusionPipeline"), ("by-model", "DiTTransformer2DModel")):
        card = hub.files(f"someone/{name}")["README.md"].decode()
        assert f'{loader}.from_pretrained("someone/{name}", ' in card
        assert "- qdiff" in card and "bits per weight" in card


def test_push_to_hub_of_a_text_encoder_writes_the_card_of_transformers_models(hub, client, tmp_path):
    done = client.run(
        f"""
        import transformers, qdiff_diffusers
        sizes = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained({str(tmp_path)!r})
        config = qdiff_diffusers.RTNConfig(bits=4)
        encoder = transformers.T5EncoderModel.from_pretrained({str(tmp_path)!r}, quantization_config=config)
        encoder.push_to_hub("someone/encoder")
        encoder.config.push_to_hub("someone/only-a-config")
        """
    )
    assert done.code == 0, done.err
    assert hub.files("someone/only-a-config").keys() == {"config.json", "README.md"}
    card = hub.files("someone/encoder")["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers" and "bits per weight" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    done = client.run(f"{snippet}\nprint(type(model).__name__, type(model.encoder.block[0].layer[0].SelfAttention.q).__name__)")
    assert done.out == "T5EncoderModel QDiffLinear\n", done.err


BASE_CARD = "---\nlicense: other\nlicense_name: a-name\nlicense_link: LICENSE.md\npipeline_tag: text-to-image\n---\nTheirs.\n"


def test_what_is_loaded_by_name_passes_on_its_name_and_licence(hub, client, tmp_path):
    """A pipeline on the Hub, its transformer and its text encoder quantized one by one, as far as their cards."""
    shutil.copytree(DEMO_MODEL, tmp_path / "base")
    (tmp_path / "base/README.md").write_text(BASE_CARD)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    transformers = pytest.importorskip("transformers")
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "base/text_encoder")
    hub.publish("maker/base", tmp_path / "base")
    done = client.run(
        """
        import diffusers, transformers, qdiff_diffusers
        kinds = {"transformer": diffusers.DiTTransformer2DModel, "text_encoder": transformers.T5EncoderModel}
        for name, kind in kinds.items():
            config = qdiff_diffusers.RTNConfig(bits=4)
            model = kind.from_pretrained("maker/base", subfolder=name, quantization_config=config)
            model.push_to_hub(f"someone/base-{name}")
        """
    )
    assert done.code == 0, done.err
    for name, task in (("transformer", "text-to-image"), ("text_encoder", "feature-extraction")):
        data = yaml.safe_load(hub.files(f"someone/base-{name}")["README.md"].decode().split("---")[1])
        assert (data["base_model"], data["base_model_relation"]) == ("maker/base", "quantized")
        assert (data["license"], data["license_name"], data["pipeline_tag"]) == ("other", "a-name", task)


@pytest.fixture(scope="module")
def evaluation(pipeline, tmp_path_factory) -> Path:
    """What ``qdiff eval`` makes of that pipeline."""
    from qdiff_diffusers.evaluation.evaluate import Settings, run_eval
    from qdiff_diffusers.evaluation.rows import parse_rows
    from qdiff_diffusers.evaluation.subject import find_subject

    output = tmp_path_factory.mktemp("evaluation") / "out"
    subject = find_subject("dit", steps=2)
    rows = parse_rows([{"folder": str(pipeline)}, {"method": "rtn", "bits": 8}], subject)
    run_eval(subject, rows, output, Settings(images=4, paired=3, keep_models=True), command=f"qdiff eval dit -c {pipeline} -o out")
    return output


def test_scores_and_pictures_of_an_evaluation_go_into_the_card(hub, client, pipeline, evaluation, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "demo", copy_function=shutil.copy2))
    before = snapshot(folder)
    assert client.qdiff("push", folder, "someone/evaluated", "--eval", evaluation).code == 0
    assert snapshot(folder) == before
    files = hub.files("someone/evaluated")
    row = json.loads((evaluation / "results.json").read_text())["rows"][1]
    told = {entry["metric"]: entry for entry in json.loads(files["qdiff_results.json"])["results"]}
    assert told["psnr"]["value"] == pytest.approx(row["scores"]["psnr"][0], rel=1e-3)
    assert told["psnr"]["margin"] == pytest.approx(row["scores"]["psnr"][1], rel=1e-3)
    assert "baseline" in told["accuracy"] and told["accuracy"]["value"] == 100 * row["scores"]["accuracy"][0]
    assert {"samples/the-first-4-images.png", "samples/the-first-4-images-16bit.png"} < files.keys()
    card = files["README.md"].decode()
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"] for metric in metrics} == told.keys()
    assert "| 16 bits | ![the first 4 images, 16 bits](samples/the-first-4-images-16bit.png) |" in card
    assert re.search(r"\| PSNR against the 16-bit images \(dB\) \| \d+\.\d+ ± \d+\.\d+ \|", card)
    assert "4 images per model, the first 3 compared one by one, 2 steps, guidance 2," in card
    assert str(pipeline.parent) not in card and "qdiff eval dit -c demo-fp4 -o out" in card


def test_a_model_that_the_evaluation_made_has_its_scores_too(hub, client, evaluation):
    (kept,) = evaluation.glob("rows/*/model")
    assert client.qdiff("push", kept, "someone/kept", "--eval", evaluation).code == 0
    assert json.loads(hub.files("someone/kept")["qdiff_results.json"])["results"]


def test_an_evaluation_of_something_else_is_refused(hub, client, model, pipeline, evaluation, tmp_path):
    assert "has no row of" in refused(client, model, "someone/else", "--eval", str(evaluation))
    assert "is no output folder of `qdiff eval`" in refused(client, pipeline, "someone/else", "--eval", str(tmp_path))
    moved = Path(shutil.copytree(evaluation, tmp_path / "out"))
    table = json.loads((moved / "results.json").read_text())
    table["rows"][1]["definition"]["config"] = "that of an older state"
    (moved / "results.json").write_text(json.dumps(table))
    assert "was changed after" in refused(client, pipeline, "someone/else", "--eval", str(moved))
    assert "someone/else" not in hub.repos


def test_a_branch_is_made_and_loaded_by_its_name(hub, client, model):
    assert client.qdiff("push", model, "someone/branches", "--revision", "two-bits").code == 0
    repo = hub.repos["someone/branches"]
    assert not repo.commits[repo.branches["main"]] and WEIGHTS.removesuffix(".safetensors") in str(
        repo.commits[repo.branches["two-bits"]].keys()
    )
    assert client.qdiff("inspect", "someone/branches", "--revision", "two-bits").code == 0


def test_pushing_again_sends_only_what_changed(hub, client, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    assert client.qdiff("push", folder, "someone/again").code == 0
    hub.log.clear()
    (folder / "notes.txt").write_text("new")
    assert client.qdiff("push", folder, "someone/again").code == 0
    assert not hub.requests(UPLOAD)
    assert hub.files("someone/again")["notes.txt"] == b"new"


def test_a_card_written_by_hand_stays(hub, client, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert client.qdiff("push", folder, "someone/own-words").code == 0
    assert b"My own words" in hub.files("someone/own-words")["README.md"]


class TestBeforeAnythingIsSent:
    @pytest.fixture
    def broken(self, model, tmp_path) -> Path:
        return Path(shutil.copytree(model, tmp_path / "model"))

    def check(self, hub, client, folder, named):
        assert named in refused(client, folder, "someone/broken")
        assert not hub.log

    def test_a_shard_is_missing(self, hub, client, broken):
        shard = next(broken.glob("*00002-of*"))
        shard.unlink()
        self.check(hub, client, broken, shard.name)

    def test_a_shard_is_cut_off(self, hub, client, broken):
        shard = next(broken.glob("*00002-of*"))
        shard.write_bytes(shard.read_bytes()[:-5])
        self.check(hub, client, broken, "truncated")

    def test_a_pickle_lies_there(self, hub, client, broken):
        (broken / "optimizer.pt").write_bytes(b"\x80\x04")
        self.check(hub, client, broken, "pickle")

    def test_results_are_malformed(self, hub, client, broken):
        (broken / "qdiff_results.json").write_text(json.dumps({"results": [{"metric": "psnr", "value": "high"}]}))
        self.check(hub, client, broken, "qdiff_results.json")

    def test_a_component_of_a_pipeline_is_missing(self, hub, client, pipeline, tmp_path):
        folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
        shutil.rmtree(folder / "vae")
        self.check(hub, client, folder, "lacks vae/")

    def test_it_is_not_quantized(self, hub, client):
        self.check(hub, client, DEMO_MODEL, "no qdiff checkpoint")

    @pytest.mark.parametrize("name", ["a/b/c", "someone/", "spaces are bad", "../up"])
    def test_the_name_is_none(self, hub, client, model, name):
        assert "cannot be a name on the Hub" in refused(client, model, name)
        assert not hub.log

    def test_all_shards_of_a_component_are_missing(self, hub, client, pipeline, tmp_path):
        folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
        for path in (folder / "vae").glob("*.safetensors"):
            path.unlink()
        self.check(hub, client, folder, "holds no safetensors file")
        index = {"metadata": {}, "weight_map": {"weight": "model-00001-of-00002.safetensors"}}
        (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        self.check(hub, client, folder, "names model-00001-of-00002.safetensors, which is not there")
