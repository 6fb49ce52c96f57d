"""Metrics against closed forms, seeded sampling, and the demo from end to end."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qdiff_diffusers import ConfigError
from qdiff_diffusers.evaluation import (
    Statistics,
    class_accuracy,
    feature_statistics,
    frechet_distance,
    image_labels,
    image_seeds,
    load_classifier,
    load_statistics,
    psnr,
    sample,
    save_statistics,
    ssim,
)
from qdiff_diffusers.evaluation import demo as demo_module
from qdiff_diffusers.evaluation.classifier import classify
from qdiff_diffusers.evaluation.demo import DEMO_CONFIGS, DEMO_MODEL, run_demo
from qdiff_diffusers.evaluation.grid import GridRow, draw_grid
from qdiff_diffusers.evaluation.plot import LINES, TEXT, quality_plot
from qdiff_diffusers.evaluation.report import best_of_group
from qdiff_diffusers.evaluation.sampling import num_steps
from qdiff_diffusers.evaluation.workers import Reporter, run_jobs


def constant(value: float, size: int = 16) -> torch.Tensor:
    return torch.full((2, 1, size, size), value)


class TestImageMetrics:
    def test_psnr_of_a_constant_offset(self):
        assert psnr(constant(0.6), constant(0.5)) == pytest.approx([20.0, 20.0], abs=1e-5)

    def test_psnr_is_per_image_and_infinite_for_equal_images(self):
        images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        assert psnr(images, torch.zeros(2, 1, 4, 4)).tolist() == [math.inf, 0.0]

    def test_ssim_of_equal_images_is_one(self):
        images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        assert ssim(images, images) == pytest.approx([1.0] * 3)

    def test_ssim_of_constant_images_is_the_luminance_term(self):
        a, b, c1 = 0.25, 0.75, 0.01**2
        assert ssim(constant(a), constant(b)) == pytest.approx([(2 * a * b + c1) / (a * a + b * b + c1)] * 2)

    def test_ssim_agrees_with_scikit_image(self):
        metrics = pytest.importorskip("skimage.metrics")
        x = torch.rand(2, 3, 24, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = (x + 0.2 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0}
        expected = [metrics.structural_similarity(a.numpy(), b.numpy(), **settings) for a, b in zip(x, y, strict=True)]
        assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-9)

    def test_ssim_of_a_mirrored_contrast_is_negative(self):
        images = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
        assert ssim(images, 1 - images) < -0.9

    def test_ssim_agrees_with_a_direct_sum_over_windows(self):
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.rand(1, 1, 13, 12, generator=generator).double() for _ in range(2))
        offsets = torch.arange(11).double() - 5
        window = torch.exp(-0.5 * (offsets[:, None] ** 2 + offsets[None] ** 2) / 1.5**2)
        window /= window.sum()
        values = []
        for top in range(3):
            for left in range(2):
                a, b = (z[0, 0, top : top + 11, left : left + 11] for z in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
                values.append(luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
        assert ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item())

    def test_shapes_that_differ_are_refused(self):
        with pytest.raises(ValueError, match=r"\[2, 1, 16, 16\] and \[2, 1, 8, 8\]"):
            psnr(constant(0.0), constant(0.0, size=8))
        with pytest.raises(ValueError, match="at least 11 x 11"):
            ssim(constant(0.0, size=8), constant(0.0, size=8))


class TestFrechetDistance:
    def test_of_diagonal_gaussians(self):
        a = Statistics(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
        b = Statistics(np.array([1.0, 5.0]), np.diag([1.0, 25.0]))
        assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 5) ** 2)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**31), st.integers(2, 8))
    def test_is_a_symmetric_distance(self, seed: int, features: int):
        generator = torch.Generator().manual_seed(seed)
        a, b = (feature_statistics(torch.randn(features + 2, features, generator=generator)) for _ in range(2))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
        assert frechet_distance(a, b) > 0

    def test_agrees_with_the_matrix_square_root(self):
        linalg = pytest.importorskip("scipy.linalg")
        generator = torch.Generator().manual_seed(0)
        a, b = (feature_statistics(torch.randn(50, 6, generator=generator)) for _ in range(2))
        root = linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

    def test_survives_fewer_samples_than_features(self):
        a = feature_statistics(torch.randn(1, 4))
        assert math.isfinite(frechet_distance(a, Statistics(np.zeros(4), np.eye(4))))

    def test_statistics_survive_a_file(self, tmp_path):
        before = feature_statistics(torch.randn(9, 5))
        save_statistics(tmp_path / "s.npz", before)
        after = load_statistics(tmp_path / "s.npz")
        assert np.allclose(before.mean, after.mean) and np.allclose(before.covariance, after.covariance)
        assert after.covariance.dtype == np.float64


def test_class_accuracy_counts_the_largest_logit():
    assert class_accuracy(torch.eye(4), [0, 1, 2, 0]) == 0.75


class FakePipeline:
    """Called like DiTPipeline; an image is its generator's first random numbers, shifted by the label."""

    def __init__(self):
        self.transformer = torch.nn.Identity()

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, class_labels, generator, guidance_scale, num_inference_steps, output_type):
        for _ in range(num_inference_steps):
            self.transformer(torch.zeros(1))
        noise = torch.stack([torch.randn(4, 4, 1, generator=g) for g in generator])
        return SimpleNamespace(images=(noise + torch.tensor(class_labels).view(-1, 1, 1, 1)).numpy())


class TestSampling:
    def test_an_image_depends_on_its_seed_alone(self):
        labels, seeds = image_labels(7, 10), image_seeds(7, seed=3)
        together = sample(FakePipeline(), labels, seeds, batch_size=7)
        apart = sample(FakePipeline(), labels[::-1], seeds[::-1], batch_size=2)
        assert torch.equal(together, apart.flip(0))
        assert together.shape == (7, 1, 4, 4)

    def test_a_small_set_begins_a_larger_one_and_sets_do_not_overlap(self):
        assert image_seeds(5, 2) == image_seeds(9, 2)[:5]
        assert not set(image_seeds(1000, 0)) & set(image_seeds(1000, 1))
        assert image_labels(12, 10)[-2:] == [0, 1]

    def test_progress_is_told_of_every_step_of_every_batch(self):
        calls = []
        sample(FakePipeline(), [0] * 5, range(5), steps=3, batch_size=2, on_step=lambda: calls.append(1))
        assert len(calls) == num_steps(5, steps=3, batch_size=2) == 9

    def test_labels_and_seeds_must_match(self):
        with pytest.raises(ValueError, match="2 labels and 1 seeds"):
            sample(FakePipeline(), [0, 1], [0])


def square(job: int, reporter: Reporter) -> int:
    reporter.start(f"job {job}", 1)
    reporter.step()
    if job < 0:
        raise ConfigError("negative")
    return job * job


class TestWorkers:
    def test_results_keep_the_order_of_the_jobs(self):
        assert run_jobs(square, [1, 2, 3], workers=1, steps=3) == [1, 4, 9]

    def test_processes_give_the_same_results(self):
        assert run_jobs(square, [1, 2, 3], workers=2, steps=3) == [1, 4, 9]

    def test_an_error_in_a_worker_is_raised_here(self):
        with pytest.raises(ConfigError, match="negative"):
            run_jobs(square, [-1, 2], workers=2, steps=2)


class TestDemoModel:
    def test_the_classifier_knows_the_reference_features(self):
        classifier = load_classifier(DEMO_MODEL / "classifier" / "model.safetensors")
        statistics = load_statistics(DEMO_MODEL / "classifier" / "statistics.npz")
        features, logits = classify(classifier, torch.zeros(2, 1, 32, 32))
        assert features.shape == (2, 128) and logits.shape == (2, 10)
        assert statistics.covariance.shape == (128, 128)

    def test_it_is_small_and_has_a_note_on_its_making(self):
        files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 21e6
        assert DEMO_MODEL / "README.md" in files


class TestPictures:
    def test_grid_has_a_row_for_each_configuration_and_a_column_for_each_seed(self):
        rows = [GridRow("16-bit", "16.00", "", torch.ones(3, 1, 8, 8))]
        rows.append(GridRow("AQ 2-bit", "2.01", "25.1", torch.ones(3, 1, 8, 8), opens_group=True, best=True))
        small = draw_grid(rows[:1], ["a", "b", "c"], title="t", subtitle="s", zoom=2)
        large = draw_grid(rows, ["a", "b", "c"], title="t", subtitle="s", zoom=2)
        assert large.width == small.width and large.height > small.height + 16

    def test_grid_is_as_wide_as_its_headings_and_leaves_room_for_names(self):
        row = GridRow("a", "", "", torch.rand(1, 1, 8, 8))
        narrow = draw_grid([row], ["x"], title="t", subtitle="s")
        assert draw_grid([row], ["x"], title="t", subtitle="s" * 200).width > narrow.width
        named = draw_grid([replace(row, name="a much longer name than a column has room for")], ["x"], title="t", subtitle="s")
        assert narrow.width < named.width < draw_grid([row], ["x"], title="t", subtitle="s" * 400).width

    def test_grid_takes_colour_images(self):
        image = draw_grid([GridRow("a", "", "", torch.rand(1, 3, 8, 8))], ["x"], title="", subtitle="")
        assert image.mode == "RGB"

    def test_plot_takes_its_colours_from_the_page(self):
        pytest.importorskip("matplotlib")
        svg = quality_plot({"aq": [(2.0, 25.0), (4.0, 38.0)]})
        assert svg.startswith("<svg") and "currentColor" in svg and "AQ" in svg
        assert TEXT not in svg and LINES not in svg

    def test_plot_is_left_out_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert quality_plot({"aq": [(2.0, 25.0)]}) is None

    def test_best_of_group_compares_within_equal_nominal_bits(self):
        rows = [
            {"name": "ref", "method": "none", "nominal_bits": 16, "psnr": None},
            {"name": "a4", "method": "rtn", "nominal_bits": 4, "psnr": 35.0},
            {"name": "b4", "method": "aq", "nominal_bits": 4, "psnr": 37.0},
            {"name": "a2", "method": "rtn", "nominal_bits": 2, "psnr": 20.0},
            {"name": "b2", "method": "aq", "nominal_bits": 2, "psnr": 20.0},
        ]
        assert best_of_group(rows, "psnr") == {"b4"}


class TestDemo:
    def test_every_method_stands_beside_round_to_nearest(self):
        by_bits = {c.bits: {d.method for d in DEMO_CONFIGS if d.bits == c.bits} for c in DEMO_CONFIGS}
        assert {8, 4, 3, 2} <= set(by_bits)
        assert all("rtn" in methods for bits, methods in by_bits.items() if bits >= 2)
        assert any(c.method == "aq" and c.bits <= 1.5 for c in DEMO_CONFIGS)

    def test_writes_picture_page_and_table(self, tmp_path, monkeypatch):
        monkeypatch.setattr(demo_module, "DEMO_CONFIGS", tuple(c for c in DEMO_CONFIGS if c.bits in (2, 4)))
        monkeypatch.setattr(demo_module, "STEPS", 4)
        returned = run_demo(tmp_path / "out", images=2, methods=["rtn"])
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results == returned
        reference, *quantized = results["rows"]
        assert reference["method"] == "none" and reference["bits_per_weight"] == 16
        assert [row["method"] for row in quantized] == ["rtn", "rtn"]
        assert quantized[0]["psnr"] > quantized[1]["psnr"]
        assert quantized[1]["size_bytes"] < quantized[0]["size_bytes"] < reference["size_bytes"]
        keys = {"name", "method", "bits_per_weight", "size_bytes", "load_seconds", "psnr", "ssim", "frechet", "accuracy"}
        assert all(keys | {"seconds_per_image"} <= set(row) for row in results["rows"])
        assert {"torch", "diffusers", "processor", "date", "seeds"} <= set(results["run"])
        with Image.open(tmp_path / "out" / "grid.png") as grid:
            assert grid.width > 300
        page = (tmp_path / "out" / "report.html").read_text()
        assert "data:image/png;base64," in page and "Round-to-nearest 4-bit" in page
        assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
        assert not list((tmp_path / "out").glob("*.part"))

    def test_refuses_what_it_cannot_do_before_any_work(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown method gptq"):
            run_demo(tmp_path / "out", images=1, methods=["gptq"])
        with pytest.raises(ConfigError, match="at least 1"):
            run_demo(tmp_path / "out", images=0)
        assert not (tmp_path / "out").exists()
