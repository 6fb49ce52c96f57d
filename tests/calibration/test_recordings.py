"""What calibrations record: shared by later ones of the same pipeline, and no more often than memory makes it necessary."""

from __future__ import annotations

import json

import pytest
import torch
from calibration.test_calibrate import FEW, assert_equal, dit, tensors
from diffusers import DDIMScheduler

from qdiff_diffusers import AQConfig, Calibration, ConfigError, FPConfig, RTNConfig, quantize


def forward_calls(model: torch.nn.Module) -> list[int]:
    """A list that grows with every call of the model."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("config", [RTNConfig(bits=2), FPConfig(bits=4, activations="int8", activation_scales="static")])
def test_recordings_serve_other_calibrations_which_end_with_the_same_bits(config, tmp_path):
    alone = quantize(dit(), config, calibration=FEW)
    quantize(dit(), AQConfig(bits=2), calibration=FEW | {"recordings": tmp_path})
    pipe = dit()
    seen = forward_calls(pipe.transformer)
    folder = tmp_path / "out"
    quantize(pipe, config, folder, calibration=FEW | {"recordings": tmp_path})
    assert not seen  # neither sampled nor asked again
    assert_equal(tensors(pipe.transformer), tensors(alone.transformer))
    log = json.loads((folder / "transformer" / "calibration.json").read_text())
    assert all(entry["saved_seconds"] > 0 for entry in log)


def test_recordings_of_other_trajectories_and_other_models_are_not_taken(tmp_path):
    quantize(dit(), RTNConfig(bits=2), calibration=FEW | {"recordings": tmp_path})
    for change in ({"seed": 1}, {"steps": 2}, {"guidance_scale": 0.5}, {"class_labels": [1, 0]}):
        pipe = dit()
        seen = forward_calls(pipe.transformer)
        quantize(pipe, RTNConfig(bits=2), calibration=FEW | change | {"recordings": tmp_path})
        assert seen, change
    pipe = dit()
    pipe.scheduler = DDIMScheduler(beta_end=0.01)
    seen = forward_calls(pipe.transformer)
    quantize(pipe, RTNConfig(bits=2), calibration=FEW | {"recordings": tmp_path})
    assert seen
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"recordings cannot be kept in .*file"):
        quantize(dit(), RTNConfig(bits=2), calibration=FEW | {"recordings": tmp_path / "file"})
    with pytest.raises(ConfigError, match="recordings"):
        Calibration(run=lambda *_: None, recordings=tmp_path)


def test_blocks_are_recorded_together_as_far_as_memory_goes_and_alone_beyond_to_the_same_bits():
    tuning = {"steps": 3, "objective": "blocks", "assignments": "fixed"}
    many, few = (dit() for _ in range(2))
    passes = [forward_calls(pipe.transformer) for pipe in (many, few)]
    quantize(many, RTNConfig(bits=2), calibration=FEW | {"hessian": False, "tuning": tuning})
    quantize(few, RTNConfig(bits=2), calibration=FEW | {"hessian": False, "tuning": tuning, "memory_limit": 1})
    assert_equal(tensors(many.transformer), tensors(few.transformer))
    assert len(passes[0]) < len(passes[1])
