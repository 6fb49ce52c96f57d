"""Precision, recall, relative errors and bootstrap intervals against closed forms and their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_diffusers.evaluation import Statistics, feature_statistics, frechet_distance
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.intervals import bootstrap, mean_estimate
from qdiff_diffusers.evaluation.metrics import precision_recall, relative_error
from qdiff_diffusers.evaluation.scores import Scorer


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


class TestScorer:
    def test_scores_of_the_bundled_classifier(self):
        generator = torch.Generator().manual_seed(0)
        reference = torch.rand(12, 1, 32, 32, generator=generator)
        scorer = Scorer(reference, 5, [0] * 12, DEMO_MODEL / "classifier")
        scores = scorer.scores((reference + 0.1).clamp(0, 1), False)
        assert 20 <= scores["psnr"][0] < 22 and 0 < scores["ssim"][0] < 1
        assert scores["frechet"][0] > scores["frechet_16bit"][0] > 0
        assert {"precision", "recall", "precision_16bit", "recall_16bit", "accuracy"} <= set(scores)
        own = scorer.scores(reference, True)
        assert "psnr" not in own and "frechet_16bit" not in own and own["frechet"][0] > 0

    def test_a_score_that_does_not_apply_is_left_out(self):
        reference = torch.rand(3, 3, 8, 8)
        scores = Scorer(reference, 3, None, None).scores(reference.clone(), False)
        assert scores == {"psnr": None, "ssim": None, "lpips": None}  # infinite, too small, no weights
