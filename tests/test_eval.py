"""``qdiff eval`` from end to end on tiny pipelines, its metrics against closed forms, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from diffusers import AutoencoderTiny, DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qdiff_diffusers import ConfigError, RTNConfig, api
from qdiff_diffusers.bench import k_quants
from qdiff_diffusers.bench.contenders import Contender
from qdiff_diffusers.bench.peers import UnchangedError
from qdiff_diffusers.cli import main
from qdiff_diffusers.cli.eval import parse_classes
from qdiff_diffusers.evaluation import Statistics, evaluate, feature_statistics, frechet_distance, peers, sample
from qdiff_diffusers.evaluation.build import load
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.evaluate import Settings, run_eval
from qdiff_diffusers.evaluation.intervals import bootstrap, mean_estimate
from qdiff_diffusers.evaluation.metrics import precision_recall, relative_error
from qdiff_diffusers.evaluation.probes import Probes, layer_errors, record, step_errors
from qdiff_diffusers.evaluation.rows import calibration_of, parse_rows, read_row_file
from qdiff_diffusers.evaluation.scores import Judge
from qdiff_diffusers.evaluation.store import RowStore
from qdiff_diffusers.evaluation.subject import BUNDLED, find_subject

SMALL = Settings(images=4, paired=3, batch_size=2)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory) -> Path:
    """A class-conditional pipeline with a transformer."""
    folder = tmp_path_factory.mktemp("pipelines") / "by-class"
    vae = AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_noise(tmp_path_factory) -> Path:
    """An unconditional pipeline with a UNet."""
    folder = tmp_path_factory.mktemp("pipelines") / "of-noise"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder


def subject_of(folder: Path, **options):
    if "classes" in options:  # the tiny transformer has no row for DiTPipeline's label of "no class"
        options = {"guidance_scale": 1.0} | options
    return find_subject(str(folder), **({"steps": 2} | options))


def evaluated(folder: Path, rows: list, output: Path, settings: Settings = SMALL, **options) -> dict:
    subject = subject_of(folder, **options)
    return run_eval(subject, parse_rows(rows, subject), output, settings)


class TestPrecisionAndRecall:
    @settings(max_examples=20)
    @given(st.integers(0, 2**31), st.integers(4, 40), st.integers(1, 6))
    def test_are_one_for_identical_sets(self, seed: int, samples: int, features: int):
        x = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))
        inside, covered = precision_recall(x, x.clone())
        assert inside.all() and covered.all()

    @settings(max_examples=20)
    @given(st.integers(0, 2**31), st.integers(4, 20), st.integers(4, 20))
    def test_swap_when_the_sets_swap(self, seed: int, samples: int, references: int):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(samples, 3, generator=generator), torch.randn(references, 3, generator=generator)
        inside, covered = precision_recall(x, y)
        other_inside, other_covered = precision_recall(y, x)
        assert torch.equal(inside, other_covered) and torch.equal(covered, other_inside)

    def test_are_zero_for_sets_far_apart(self):
        x = torch.randn(10, 2)
        inside, covered = precision_recall(x, x + 1000)
        assert not inside.any() and not covered.any()

    def test_tell_what_is_missing_from_what_is_wrong(self):
        real = torch.cat([torch.randn(20, 2), torch.randn(20, 2) + 100])
        inside, covered = precision_recall(real[:20], real)
        assert inside.all() and covered[:20].all() and not covered[20:].any()

    def test_need_more_samples_than_neighbours(self):
        with pytest.raises(ValueError, match="more than 3 samples, got 3 and 9"):
            precision_recall(torch.randn(3, 2), torch.randn(9, 2))


class TestIntervals:
    @settings(max_examples=20)
    @given(st.floats(-3, 3), st.floats(0.1, 4), st.integers(1, 5))
    def test_frechet_distance_of_shifted_and_scaled_gaussians_is_exact(self, shift: float, scale: float, features: int):
        """``|shift|^2 + (scale - 1)^2`` per feature, the formula for Gaussians of parallel axes."""
        x = torch.randn(50, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        a, b = feature_statistics(x), feature_statistics(scale * x + shift)
        mean = (scale - 1) * a.mean + shift
        expected = (mean**2).sum() + (scale - 1) ** 2 * a.covariance.trace()
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)

    def test_cover_the_true_mean_about_as_often_as_they_say(self):
        generator = torch.Generator().manual_seed(0)
        estimates = [mean_estimate(torch.randn(60, generator=generator) + 5) for _ in range(200)]
        covered = sum(e.low <= 5 <= e.high for e in estimates)
        assert 180 <= covered <= 199

    def test_have_the_width_of_the_standard_error(self):
        values = torch.randn(400, generator=torch.Generator().manual_seed(1))
        expected = 1.96 * values.std().item() / math.sqrt(400)
        assert mean_estimate(values).margin == pytest.approx(expected, rel=0.1)

    def test_are_the_same_every_time_and_unknown_for_one_sample(self):
        values = torch.randn(9)
        assert mean_estimate(values) == mean_estimate(values)
        assert math.isnan(mean_estimate(values[:1]).margin)

    def test_are_around_the_estimate_itself(self):
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
        target = Statistics(feature_statistics(x).mean, feature_statistics(x).covariance)
        estimate = bootstrap(lambda index: frechet_distance(feature_statistics(x[index]), target), 40, 20)
        assert estimate.value == pytest.approx(0, abs=1e-6) and estimate.margin > 0


def test_relative_error_is_that_of_each_sample_averaged():
    reference = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    assert relative_error(reference + torch.tensor([[0.5, 0.0], [0.0, 3.0]]), reference) == pytest.approx((0.1 + 0.3) / 2)
    assert relative_error(reference, reference) == 0


class TestWholeRuns:
    def test_writes_every_row_everywhere(self, by_class, tmp_path):
        rows = ["rtn:bits=8", {"name": "AQ <tiny>", "method": "aq", "bits": 2, "effort": 0}]
        results = evaluated(by_class, rows, tmp_path, classes=range(5))
        assert results == json.loads((tmp_path / "results.json").read_text())
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=8", "AQ <tiny>"]
        reference, fine, coarse = results["rows"]
        assert fine["scores"]["psnr"][0] > coarse["scores"]["psnr"][0] + 6
        assert fine["scores"]["ssim"][0] > coarse["scores"]["ssim"][0]
        assert reference["bits_per_weight"] == 16 > fine["bits_per_weight"] > 8 > coarse["bits_per_weight"]
        assert reference["size_bytes"] > fine["size_bytes"] > coarse["size_bytes"]
        assert reference["sparsity"] is None and 0 <= fine["sparsity"] < 0.1 and coarse["sparsity"] is not None
        assert all(row["images"] == 4 and row["seconds_per_image"] > 0 for row in results["rows"])
        page, table = (tmp_path / "report.html").read_text(), (tmp_path / "table.md").read_text()
        assert "AQ &lt;tiny&gt;" in page and "rtn bits=8" in page
        assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
        assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 3
        assert (tmp_path / "grid.png").stat().st_size > 1000 and not list(tmp_path.rglob("*.part"))

    def test_errors_by_step_and_by_layer_belong_to_the_row(self, by_class, tmp_path):
        skip = {"method": "rtn", "bits": 2, "modules_to_not_convert": ["transformer_blocks.1"]}
        row = evaluated(by_class, [skip], tmp_path, classes=[1])["rows"][1]
        assert [timestep for timestep, _ in row["step_errors"]] == [500, 0]
        assert all(0 < error < 2 for _, error in row["step_errors"])
        touched = {name for name, error in row["layer_errors"].items() if error > 0}
        assert touched == {name for name in row["layer_errors"] if "transformer_blocks.0" in name}
        assert row["layers"] * 2 == row["target_layers"] == len(row["layer_errors"])

    def test_asks_a_pipeline_for_nothing_but_noise(self, of_noise, tmp_path):
        results = evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert results["run"]["asked for"] == "nothing" and results["rows"][1]["scores"]["psnr"][0] > 10
        assert "accuracy" not in results["rows"][1]["scores"] and "frechet" not in results["rows"][1]["scores"]

    def test_goes_on_where_it_was_interrupted_with_identical_results(self, of_noise, tmp_path, monkeypatch):
        rows = ["rtn:bits=4", "rtn:bits=2"]
        evaluated(of_noise, rows, tmp_path / "once")
        drawn, draw = [], evaluate._draw

        def interrupted(job, pipe, first, *more):
            drawn.append((job.row.name, first))
            if len(drawn) == 5:
                raise KeyboardInterrupt
            return draw(job, pipe, first, *more)

        monkeypatch.setattr(evaluate, "_draw", interrupted)
        monkeypatch.setattr(evaluate, "PART", 2)
        with pytest.raises(KeyboardInterrupt):
            evaluated(of_noise, rows, tmp_path / "twice")
        partial = json.loads((tmp_path / "twice" / "results.json").read_text())
        assert "failed" not in partial["rows"][0] and partial["rows"][2]["failed"] == "not made yet"
        after = evaluated(of_noise, rows, tmp_path / "twice")
        probed, *drawn = drawn  # the reference draws a few images more, to see what its denoiser is asked
        assert probed == ("16-bit", 0)
        assert drawn[3] == drawn[4] == ("rtn bits=4", 2)  # only the part that was interrupted was begun again
        assert len(drawn) == len(set(drawn)) + 1 == 7
        assert [timeless(row) for row in after["rows"]] == [
            timeless(row) for row in json.loads((tmp_path / "once" / "results.json").read_text())["rows"]
        ]

    def test_a_second_run_draws_nothing_and_writes_the_same_file(self, of_noise, tmp_path, monkeypatch):
        evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        before = (tmp_path / "results.json").read_bytes()
        monkeypatch.setattr(evaluate, "build", lambda *_: pytest.fail("built a model again"))
        evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert (tmp_path / "results.json").read_bytes() == before

    def test_more_images_go_on_from_those_there_are(self, of_noise, tmp_path):
        few = evaluated(of_noise, ["rtn:bits=4"], tmp_path, Settings(images=2, paired=2, batch_size=2))
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("images-*")}
        more = evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert all(path.stat().st_mtime_ns == time for path, time in files.items())
        assert more["rows"][1]["images"] == 4 and more["rows"][1]["scores"] != few["rows"][1]["scores"]
        assert more["rows"][1]["step_errors"] == few["rows"][1]["step_errors"]

    def test_images_beyond_the_paired_ones_may_be_drawn_in_another_dtype(self, by_class, tmp_path):
        same = replace(SMALL, paired=2)  # a whole batch: results depend on how many images are drawn together
        exact = evaluated(by_class, ["rtn:bits=4"], tmp_path / "exact", same, classes=[0, 3])
        budget = replace(same, rest_dtype="bfloat16")
        assert list(budget.parts(0)) == [(0, 2, "float32"), (2, 4, "bfloat16")] and list(budget.parts(4)) == []
        mixed = evaluated(by_class, ["rtn:bits=4"], tmp_path / "mixed", budget, classes=[0, 3])
        assert mixed["rows"][1]["scores"]["psnr"] == exact["rows"][1]["scores"]["psnr"]
        images = [tmp_path / n / "rows" / r["rows"][1]["folder"] for n, r in (("exact", exact), ("mixed", mixed))]
        drawn = [torch.cat([load_file(path)["images"] for path in sorted(folder.glob("images-*"))]) for folder in images]
        assert torch.equal(drawn[0][:2], drawn[1][:2]) and not torch.equal(drawn[0][2:], drawn[1][2:])
        assert torch.allclose(drawn[0][2:], drawn[1][2:], atol=0.1)
        assert "bfloat16 beyond the compared images" in (tmp_path / "mixed" / "table.md").read_text()

    def test_a_row_that_fails_stops_nobody_and_is_tried_again(self, of_noise, tmp_path, monkeypatch):
        quantize = api.quantize

        def broken(source, config, *args, **kwargs):
            if config.bits == 2:
                raise MemoryError("no room for 2 bits")
            return quantize(source, config, *args, **kwargs)

        monkeypatch.setattr(api, "quantize", broken)
        results = evaluated(of_noise, ["rtn:bits=2", "rtn:bits=4"], tmp_path)
        assert results["rows"][1]["failed"] == "MemoryError: no room for 2 bits"
        assert "failed" not in results["rows"][2] and results["rows"][2]["scores"]["psnr"]
        for name in ("report.html", "table.md"):
            assert "failed: MemoryError: no room for 2 bits" in (tmp_path / name).read_text()
        monkeypatch.setattr(api, "quantize", quantize)
        assert all("failed" not in row for row in evaluated(of_noise, ["rtn:bits=2", "rtn:bits=4"], tmp_path)["rows"])

    def test_two_processes_give_the_scores_of_one(self, of_noise, tmp_path):
        rows = ["rtn:bits=4", "rtn:bits=2"]
        one = evaluated(of_noise, rows, tmp_path / "one")
        subject = subject_of(of_noise)
        two = run_eval(subject, parse_rows(rows, subject), tmp_path / "two", SMALL, workers=2)
        assert [row["scores"] for row in one["rows"]] == [row["scores"] for row in two["rows"]]

    def test_quantized_folders_are_rows(self, by_class, tmp_path):
        api.quantize(by_class, RTNConfig(bits=4), tmp_path / "whole", dtype=torch.float32)
        shutil.copytree(tmp_path / "whole" / "transformer", tmp_path / "bare")
        rows = [str(tmp_path / "whole"), {"folder": str(tmp_path / "bare"), "name": "bare"}]
        _, whole, bare = evaluated(by_class, rows, tmp_path / "out", classes=[0, 3])["rows"]
        assert whole["name"] == "whole" and whole["scores"] == bare["scores"]
        assert whole["bits_per_weight"] == bare["bits_per_weight"] < 5

    def test_a_calibrated_model_is_better_and_kept(self, by_class, tmp_path):
        rows = [{"method": "rtn", "bits": 2, "calibration": {"samples": 3, "batch_size": 3}}, "rtn:bits=2"]
        results = evaluated(by_class, rows, tmp_path, classes=[1, 2])
        calibrated, plain = results["rows"][1:]
        assert calibrated["scores"]["psnr"][0] > plain["scores"]["psnr"][0]
        assert calibrated["size_bytes"] == plain["size_bytes"]
        kept = [(tmp_path / "rows" / row["folder"] / "model" / "model_index.json").is_file() for row in results["rows"]]
        assert kept == [False, True, False]
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=2", "rtn bits=2 (2)"]
        row = parse_rows(rows, subject_of(by_class, classes=[1, 2]))[0]
        found = calibration_of(row, subject_of(by_class, classes=[1, 2]))
        assert (found.class_labels, found.steps, found.guidance_scale, found.samples) == ([1, 2], 2, 1.0, 3)


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if "seconds" not in key and key not in ("machine", "commit")}


class TestPeers:
    @pytest.fixture
    def halved(self, monkeypatch):
        """A peer that rounds every 3x3 kernel to float16, and leaves 1x1 convolutions alone."""

        class Halved(torch.nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.weight = torch.nn.Parameter(layer.weight.data.half(), requires_grad=False)
                self.bias, self.settings = layer.bias, (layer.stride, layer.padding)

            def forward(self, x):
                return torch.nn.functional.conv2d(x, self.weight.to(x), self.bias.to(x), *self.settings)

        def convert(layer):
            if layer.weight.shape[-1] == 1:
                raise UnchangedError("left the layer as it was")
            return Halved(layer)

        peer = Contender("halved", "test", convert, 16, layers=(torch.nn.Conv2d,))
        monkeypatch.setitem(peers.PEERS, "halved", peer)
        return peer

    def test_convert_what_they_can_and_the_row_says_how_much(self, of_noise, tmp_path, halved):
        row = evaluated(of_noise, ["halved"], tmp_path)["rows"][1]
        assert 0 < row["layers"] < row["target_layers"] and row["method"] == "test"
        assert "layers, the others stay in 16 bits" in (tmp_path / "table.md").read_text()
        assert row["bits_per_weight"] == pytest.approx(16, abs=0.01)

    def test_that_take_no_layer_are_failed_rows(self, by_class, tmp_path, halved):
        assert evaluated(by_class, ["halved"], tmp_path, classes=[0])["rows"][1]["failed"].startswith(
            "UnchangedError: halved takes none"
        )

    def test_that_are_missing_are_failed_rows(self, by_class, tmp_path, monkeypatch):
        absent = Contender("absent", "test", lambda layer: layer, 4, install="absent-package", modules=("no_such_module",))
        monkeypatch.setitem(peers.PEERS, "absent", absent)
        row = evaluated(by_class, ["absent"], tmp_path, classes=[0])["rows"][1]
        assert row["failed"] == "ConfigError: absent: not installed: pip install absent-package"

    def test_linear_ones_are_drawn_with_as_plain_layers_and_others_are_not(self):
        class Decoding(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x.round() if self.rounds else x)

        model = torch.nn.ModuleDict({"weights": Decoding(6, 3), "inputs": Decoding(6, 3, bias=False)})
        model["weights"].rounds, model["inputs"].rounds = False, True
        x = torch.randn(5, 6)
        expected = model["weights"](x)
        assert peers.make_dense(model, ["weights", "inputs"]) == 1
        assert type(model["weights"]) is torch.nn.Linear and type(model["inputs"]) is Decoding
        assert torch.allclose(model["weights"](x), expected, atol=1e-6)

    def test_stored_bits_count_every_tensor_but_the_bias(self):
        layer = torch.nn.Linear(8, 4)
        model = torch.nn.ModuleDict({"dense": layer, "other": torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))})
        model["other"].register_buffer("scales", torch.zeros(4))
        assert peers.stored_bits(model, {"dense": (4, 8)}) == 16
        assert peers.stored_bits(model, {"other": (4, 8)}) == 8 * (4 * 8 * 4 + 4 * 4) / 32


K_QUANT_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144}  # of a super-block, from ggml's definitions
K_QUANT_ERRORS = {"Q2_K": 0.08, "Q3_K": 0.0227, "Q4_K": 0.0054}


class TestKQuants:
    @pytest.mark.parametrize("kind", K_QUANT_BYTES)
    def test_have_the_size_of_ggmls_blocks(self, kind):
        assert k_quants.quantize(torch.randn(3, 512), kind).shape == (3, 2 * K_QUANT_BYTES[kind])

    @pytest.mark.parametrize("kind", K_QUANT_BYTES)
    def test_are_read_by_the_gguf_package_with_a_small_error(self, kind):
        gguf = pytest.importorskip("gguf")
        weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        weight[0] = 0
        data = k_quants.quantize(weight, kind)
        decoded = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
        assert (decoded - weight).square().sum() / weight.square().sum() < K_QUANT_ERRORS[kind]
        assert not decoded[0].any()

    def test_refuse_columns_that_do_not_divide(self):
        with pytest.raises(ValueError, match="blocks of 256 weights, the layer has 100 columns"):
            k_quants.quantize(torch.randn(2, 100), "Q4_K")


class TestProbes:
    def test_survive_a_file_and_are_exact_for_the_model_itself(self, by_class, tmp_path):
        pipe = DiTPipeline.from_pretrained(by_class)
        probes = record(pipe, lambda: sample(pipe, [1, 2], [0, 1], steps=3, guidance_scale=1.0))
        probes.save(tmp_path / "p.pt")
        again = Probes.load(tmp_path / "p.pt")
        assert step_errors(pipe, again) == [(666.0, 0.0), (333.0, 0.0), (0.0, 0.0)]
        assert set(layer_errors(pipe, again).values()) == {0.0}

    def test_an_error_of_one_layer_shows_at_that_layer_only(self, by_class):
        pipe = DiTPipeline.from_pretrained(by_class)
        probes = record(pipe, lambda: sample(pipe, [1, 2], [0, 1], steps=2, guidance_scale=1.0))
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].attn1.to_q.weight *= 1.5
        wrong = {name for name, error in layer_errors(pipe, probes).items() if error > 1e-6}
        assert wrong == {"transformer.transformer_blocks.0.attn1.to_q"}
        assert all(error > 0 for _, error in step_errors(pipe, probes))


class TestSamplingOfAnyPipeline:
    def test_prompts_and_other_arguments_reach_the_pipeline(self):
        asked = []

        class Fake:
            transformer = torch.nn.Identity()

            def set_progress_bar_config(self, **kwargs):
                pass

            def __call__(self, prompt, generator, output_type, height):
                asked.append((prompt, height, len(generator)))
                return SimpleNamespace(images=torch.rand(len(prompt), 4, 4, 3).numpy())

        images = sample(Fake(), ["a", "b", "c"], range(3), steps=None, guidance_scale=None, batch_size=2, height=4)
        assert asked == [(["a", "b"], 4, 2), (["c"], 4, 1)] and images.shape == (3, 3, 4, 4)

    def test_frames_of_a_video_stand_below_one_another(self):
        frames = torch.rand(2, 3, 4, 5, 3)
        pipe = SimpleNamespace(transformer=torch.nn.Identity(), set_progress_bar_config=lambda **_: None)
        call = type("Fake", (), {"__call__": lambda self, **_: SimpleNamespace(frames=frames.numpy()), **vars(pipe)})()
        call.set_progress_bar_config = lambda **_: None
        images = sample(call, None, [0, 1], steps=None, guidance_scale=None)
        assert images.shape == (2, 3, 12, 5) and torch.equal(images[1, :, 4:8], frames[1, 1].permute(2, 0, 1))


class TestJudge:
    def test_scores_of_the_bundled_classifier(self):
        generator = torch.Generator().manual_seed(0)
        reference = torch.rand(12, 1, 32, 32, generator=generator)
        judge = Judge(reference, 5, [0] * 12, DEMO_MODEL / "classifier")
        scores = judge.scores((reference + 0.1).clamp(0, 1), False)
        assert 20 <= scores["psnr"][0] < 22 and 0 < scores["ssim"][0] < 1
        assert scores["frechet"][0] > scores["frechet_16bit"][0] > 0
        assert {"precision", "recall", "precision_16bit", "recall_16bit", "accuracy"} <= set(scores)
        own = judge.scores(reference, True)
        assert "psnr" not in own and "frechet_16bit" not in own and own["frechet"][0] > 0

    def test_a_score_that_does_not_apply_is_left_out(self):
        reference = torch.rand(3, 3, 8, 8)
        scores = Judge(reference, 3, None, None).scores(reference.clone(), False)
        assert scores == {"psnr": None, "ssim": None, "lpips": None}  # infinite, too small, no weights


class TestStore:
    def test_counts_images_up_to_the_first_gap(self, tmp_path):
        store = RowStore(tmp_path, "A row: 2 bits", {"a": 1})
        images = torch.rand(6, 1, 4, 4)
        store.add_images(0, images[:2])
        store.add_images(4, images[4:])
        assert store.count_images() == 2
        store.add_images(2, images[2:4])
        assert store.count_images() == 6
        assert torch.allclose(store.images(5), images[:5], atol=1e-3)

    def test_belongs_to_what_made_it_and_not_to_the_name(self, tmp_path):
        RowStore(tmp_path, "one name", {"bits": 2}).write_facts({"x": 1})
        assert RowStore(tmp_path, "another", {"bits": 2}).facts() == {"x": 1}
        assert RowStore(tmp_path, "one name", {"bits": 3}).facts() == {}

    def test_damage_is_named(self, tmp_path):
        store = RowStore(tmp_path, "r", {})
        store.write_facts({})
        (store.folder / "row.json").write_text("{")
        with pytest.raises(ConfigError, match="damaged; remove"):
            store.facts()


class TestMistakes:
    """One clear line each, before any work."""

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("gptq:bits=2", "'gptq:bits=2' is no method"),
            ("aq:bits=7", "bits must be one of 1.5, 2, 3, 4, got 7"),
            ("rtn:bits=4,rank=8", "rank does not go with method rtn; it takes"),
            ("aq:bits", "expected key=value, got 'bits'"),
            ({"bits": 2}, "one of method, folder and peer"),
            ({"method": "rtn", "folder": "x"}, "one of method, folder and peer"),
            ({"peer": "nobody"}, "unknown peer 'nobody'"),
            ({"peer": "gguf-Q4_0", "bits": 2}, "a row with a peer takes no bits"),
            ({"folder": "/no/such/folder"}, "neither a local folder nor"),
            (7, "a text such as aq:bits=2 or a mapping"),
            ({"method": "rtn", "bits": 4, "modules_to_not_convert": ["nonsense"]}, "no layer of .* has 'nonsense' in its name"),
            ({"method": "rtn", "bits": 4, "calibration": {"stepz": 3}}, "row rtn bits=4: calibration has no setting stepz"),
            ({"method": "rtn", "bits": 4, "calibration": [1]}, "row rtn bits=4: calibration must be a mapping"),
            ({"method": "rtn", "bits": 4, "overrides": {"nowhere": None}}, "no layer of .* has 'nowhere' in its name"),
        ],
    )
    def test_rows(self, by_class, entry, message):
        with pytest.raises(ValueError, match=message):
            parse_rows([entry], subject_of(by_class, classes=[0]))

    @pytest.mark.parametrize("name", ["fp", "svdquant"])
    def test_the_lists_of_the_papers_tables_are_understood(self, name, by_class):
        """Every row a config of its own under a name of its own; those on inputs say what to run."""
        entries = read_row_file(Path(__file__).parents[1] / "benchmarks" / "quality" / f"{name}.yaml")["rows"]
        rows = parse_rows(entries, subject_of(by_class, classes=range(10)))
        assert [row.name for row in rows] == [entry["name"] for entry in entries] and len(rows) > 60
        definitions = [json.dumps(row.definition(), sort_keys=True) for row in rows]
        assert len(set(definitions)) == len(rows)
        for row in rows:
            assert row.calibration is not None or not row.config().needs_calibration

    def test_settings_in_brackets_keep_their_commas(self, by_class):
        (row,) = parse_rows(["rtn:bits=4,modules_to_not_convert=[attn1, ff],group_size=row"], subject_of(by_class, classes=[0]))
        assert row.config().modules_to_not_convert == ["attn1", "ff"] and row.config().group_size == "row"

    def test_files_of_rows(self, tmp_path):
        path = tmp_path / "rows.yaml"
        path.write_text("rows: {a: 1}")
        with pytest.raises(ConfigError, match="must hold a list of rows"):
            read_row_file(path)
        path.write_text("- [unclosed")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_row_file(path)
        path.write_text("model: dit\nimages: 7\nrows:\n  - rtn:bits=4\n  - {method: aq, bits: 2}\n")
        assert read_row_file(path) == {"model": "dit", "images": 7, "rows": ["rtn:bits=4", {"method": "aq", "bits": 2}]}

    def test_subjects(self, by_class, tmp_path):
        with pytest.raises(ConfigError, match="single model"):
            find_subject(str(by_class / "transformer"))
        with pytest.raises(ConfigError, match="no local folder"):
            find_subject("nobody/nothing")
        with pytest.raises(ConfigError, match="takes one of them"):
            find_subject(str(by_class), classes=[1], prompts=["a shoe"])
        (tmp_path / "prompts.txt").write_text("\n  \n")
        with pytest.raises(ConfigError, match="holds no prompt"):
            find_subject(str(by_class), prompts=tmp_path / "prompts.txt")
        with pytest.raises(ConfigError, match="cannot read prompts"):
            find_subject(str(by_class), prompts=tmp_path / "missing.txt")
        with pytest.raises(ConfigError, match="list of prompts or classes is empty"):
            find_subject(str(by_class), classes=[])

    def test_classes_are_written_as_ranges(self):
        assert parse_classes("0-3,7") == [0, 1, 2, 3, 7]
        for text in ("", "a", "3-1", "1-", "-1"):
            with pytest.raises(ConfigError, match="classes are such as"):
                parse_classes(text)

    def test_a_model_that_cannot_run_is_an_error_and_not_a_row(self, by_class, tmp_path):
        with pytest.raises(ConfigError, match=r"16-bit model of .* cannot be run: TypeError"):
            evaluated(by_class, ["rtn:bits=4"], tmp_path)  # asked for nothing, it wants a class


class TestBundledModels:
    @pytest.mark.parametrize(("name", "megabytes"), [("dit", 21), ("unet", 12)])
    def test_are_small_say_how_they_were_made_and_are_judged(self, name, megabytes):
        files = [path for path in BUNDLED[name].rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < megabytes * 1e6
        assert BUNDLED[name] / "README.md" in files
        subject = find_subject(name)
        assert subject.labels == tuple(range(10)) and (subject.steps, subject.guidance_scale) == (20, 2.0)
        assert subject.stored_dtype == torch.float16 and (subject.classifier / "features.safetensors").is_file()

    def test_the_unet_is_convolutional_with_attention_at_two_resolutions(self):
        model = UNet2DModel.from_pretrained(BUNDLED["unet"], subfolder="transformer")
        kinds = [type(layer) for layer in peers.target_layers(model).values()]
        assert kinds.count(torch.nn.Conv2d) > 20 and torch.nn.Linear in kinds
        assert sum("Attn" in block for block in model.config.down_block_types) == 2

    def test_the_unet_draws_what_it_is_asked_for(self):
        pipe = load(BUNDLED["unet"], torch.float32)
        boots, trousers = sample(pipe, [9] * 2 + [1] * 2, range(4), steps=8).split(2)
        assert boots.shape == (2, 1, 32, 32)
        # A boot is wide and low, trousers are narrow and tall.
        assert boots[..., 18:28, 3:29].mean() > trousers[..., 18:28, 3:29].mean()
        assert trousers[..., 4:8, 10:22].mean() > boots[..., 4:8, 10:22].mean()


class TestCommand:
    def run(self, *arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code

    def test_rows_from_a_file_and_from_options(self, by_class, tmp_path, capsys):
        file = tmp_path / "rows.yaml"
        file.write_text(f"model: {by_class}\nclasses: 0-3\nguidance_scale: 1\nimages: 9\nsteps: 2\nrows: ['rtn:bits=4']\n")
        assert self.run("eval", "--rows", file, "-c", "rtn:bits=2", "--images", 2, "-o", tmp_path / "out", "--workers", 1) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=4", "rtn bits=2"]
        assert results["run"]["images"] == 2 and results["run"]["labels"] == [0, 1, 2, 3]
        printed = capsys.readouterr().out
        assert "rtn bits=2" in printed and "report.html" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name a model"),
            (["dit"], "there is no row to evaluate"),
            (["dit", "-c", "rtn:bits=4", "--dtype", "int3"], "dtype must be one of"),
            (["dit", "-c", "rtn:bits=4", "--rest-dtype", "int3"], "rest_dtype must be one of"),
            (["dit", "-c", "rtn:bits=4", "--size", "big"], "size is such as 512x512"),
            (["dit", "--rows", "/no/such.yaml"], "cannot be read"),
        ],
    )
    def test_mistakes(self, arguments, message, capsys, tmp_path):
        assert self.run("eval", *arguments, "-o", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_unknown_settings_in_a_file(self, capsys, tmp_path):
        (tmp_path / "rows.yaml").write_text("model: dit\nimgaes: 4\nrows: ['rtn:bits=4']\n")
        assert self.run("eval", "--rows", tmp_path / "rows.yaml") == 2
        assert "unknown settings imgaes" in capsys.readouterr().err

    def test_names_the_peers(self, capsys):
        assert self.run("eval", "--list-peers") == 0
        names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
        assert {"gguf-Q4_K", "gguf-Q3_K", "gguf-Q2_K", "sdnq-uint3-svd", "quanto-int2", "bitsandbytes-nf4"} <= names
