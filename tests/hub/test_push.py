"""Share and load by name, against a Hub on this machine and with every way it can refuse."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models
import torch
import yaml
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from hub.client import Client
from hub.fake_hub import TOKEN, FakeHub, Fault
from PIL import Image

from qdiff_diffusers import FPConfig, RTNConfig, inspect_checkpoint
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
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """One process for all tests that push, so that importing torch is paid for once."""
    with Client(hub.url, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(hub):
    hub.log.clear()
    hub.faults.clear()
    yield
    assert not [fault for fault in hub.faults if fault.times > 0 and fault.times < 100], "a fault that never struck"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A quantized model in two shards."""
    root = tmp_path_factory.mktemp("model")
    tiny_models.make("dit").save_pretrained(root / "dense")
    packed = DiTTransformer2DModel.from_pretrained(root / "dense", quantization_config=RTNConfig(bits=4))
    packed.save_pretrained(root / "packed", max_shard_size="40KB")
    assert len(list((root / "packed").glob("*.safetensors"))) == 2
    return root / "packed"


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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(client: Client, folder: Path, name: str, *options: str) -> str:
    """Push in vain: the one line that says why. Nothing may have changed on this side."""
    before = snapshot(folder)
    done = client.qdiff("push", folder, name, *options)
    lines = [line for line in done.err.splitlines() if line.startswith("qdiff: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.err, done.err
    assert snapshot(folder) == before
    return lines[0]


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


class TestFaults:
    def test_a_connection_lost_in_the_middle_of_a_file_is_tried_again(self, hub, client, model):
        hub.objects.clear()
        hub.faults.append(Fault("PUT", "/_storage/", cut=True))
        done = client.qdiff("push", model, "someone/cut-once")
        assert done.code == 0, done.err
        assert len(hub.requests(UPLOAD)) == 3
        assert hub.files("someone/cut-once").items() > snapshot(model).items()

    def test_a_download_that_breaks_off_is_tried_again(self, hub, client, model):
        assert client.qdiff("push", model, "someone/broken-off").code == 0
        hub.faults.append(Fault("GET", "/_storage/", cut=True))
        done = client.qdiff("inspect", "someone/broken-off")
        assert done.code == 0, done.err
        assert len(hub.requests("^GET /_storage/")) == 3

    def test_a_download_that_breaks_off_continues_at_the_byte_where_it_broke(self, hub, client, model):
        """huggingface_hub does it; this pins that our way of asking lets it."""
        assert client.qdiff("push", model, "someone/continued").code == 0
        client.run("import huggingface_hub; usual = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE")
        client.run("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 512")
        hub.log.clear()
        hub.faults.append(Fault("GET", "/_storage/", cut=True))
        try:
            done = client.qdiff("inspect", "someone/continued")
        finally:
            client.run("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = usual")
        assert done.code == 0, done.err
        (asked,) = [re.search(r"bytes=(\d+)-", line) for line in hub.requests("^GET /_storage/.*bytes=[1-9]")]
        assert int(asked[1]) > 1000

    def test_files_that_have_arrived_are_not_fetched_again(self, hub, client, model):
        assert client.qdiff("push", model, "someone/two-files").code == 0
        hub.log.clear()
        hub.faults.append(Fault("GET", "/_storage/", status=403, message="expired", skip=1))
        done = client.qdiff("inspect", "someone/two-files")
        assert done.code == 2 and "Traceback" not in done.err, done.err
        fetched = len(hub.requests("^GET /_storage/"))
        hub.log.clear()
        assert client.qdiff("inspect", "someone/two-files").code == 0
        assert fetched == 2 and len(hub.requests("^GET /_storage/")) == 1

    def test_with_xet_switched_on_an_endpoint_without_it(self, hub, model, tmp_path):
        """Downloads go the ordinary way; uploads say how to."""
        with Client(hub.url, tmp_path, HF_HUB_DISABLE_XET="0") as xet:
            if xet.run("import hf_xet").code:
                pytest.skip("hf_xet is not installed")
            assert "HF_HUB_DISABLE_XET=1" in refused(xet, model, "someone/with-xet")
            assert len(hub.repos["someone/with-xet"].commits) == 1
            done = xet.qdiff("inspect", "someone/two-files")
            assert done.code == 0, done.err

    def test_a_second_push_resumes_where_the_first_was_stopped(self, hub, client, model):
        hub.objects.clear()
        hub.faults.append(Fault("PUT", "/_storage/", status=403, message="Signature expired", skip=1))
        line = refused(client, model, "someone/stopped")
        assert "Signature expired" in line
        assert len(hub.repos["someone/stopped"].commits) == 1, "half a checkpoint was committed"
        assert len(hub.objects) == 1
        hub.log.clear()
        assert client.qdiff("push", model, "someone/stopped").code == 0
        assert len(hub.requests(UPLOAD)) == 1
        assert hub.files("someone/stopped").items() > snapshot(model).items()

    def test_no_hub_at_all(self, client, model):
        client.run("import huggingface_hub; there = huggingface_hub.constants.ENDPOINT")
        client.run("huggingface_hub.constants.ENDPOINT = 'http://127.0.0.1:9'")
        try:
            line = refused(client, model, "someone/unreachable")
        finally:
            client.run("huggingface_hub.constants.ENDPOINT = there")
        assert "the connection to the Hub failed" in line and "run the same command again" in line

    def test_a_token_that_is_not_accepted(self, hub, client, model):
        client.run("import os; os.environ['HF_TOKEN'] = 'hf_of_nobody'")
        try:
            line = refused(client, model, "someone/wrong-token")
        finally:
            client.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
        assert "does not accept your token" in line and "hf auth login" in line
        assert "someone/wrong-token" not in hub.repos

    def test_no_token(self, client, model):
        client.run("import os; del os.environ['HF_TOKEN']")
        try:
            assert "hf auth login" in refused(client, model, "someone/no-token")
        finally:
            client.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")

    def test_a_name_of_someone_else(self, hub, client, model):
        line = refused(client, model, "someoneelse/model")
        assert "may not write to someoneelse/model" in line and "namespace" in line

    def test_too_many_requests_are_waited_for(self, hub, client, model):
        hub.faults.append(Fault("POST", "/preupload/", status=429, message="slow down", headers={"Retry-After": "0"}))
        assert client.qdiff("push", model, "someone/patient").code == 0
        assert len(hub.requests("/preupload/")) == 2

    def test_too_many_requests_for_good(self, hub, client, model):
        hub.faults.append(Fault("POST", "/api/repos/create", status=429, message="slow down", headers={"Retry-After": "77"}))
        line = refused(client, model, "someone/impatient")
        assert "too many requests" in line and "in 77 seconds" in line

    @pytest.mark.parametrize(
        ("path", "status", "said", "told"),
        [
            ("/info/lfs/objects/batch", 403, "Private repository storage limit reached", "no space left for someone/full"),
            ("/commit/", 403, "Storage quota exceeded", "no space left for someone/full"),
            ("/commit/", 413, "Payload too large", "save with smaller shards"),
            ("/commit/", 412, "A commit has happened since", "changed by someone else at the same time"),
            ("/api/validate-yaml", 400, "x", "the Hub did not take someone/full"),
        ],
        ids=["lfs quota", "commit quota", "too large", "conflict", "card"],
    )
    def test_what_the_hub_refuses_is_said_in_one_line_and_nothing_is_committed(self, hub, client, model, path, status, said, told):
        hub.objects.clear()
        hub.faults.append(Fault("POST", path, status=status, message=said))
        line = refused(client, model, "someone/full")
        assert told in line and (said in line or status == 400)
        assert "someone/full" not in hub.repos or len(hub.repos["someone/full"].commits) == 1


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
