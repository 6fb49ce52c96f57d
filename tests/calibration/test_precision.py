"""Tuning with products in bfloat16: the same losses, on float32 parameters; chosen by what the processor can do."""

from __future__ import annotations

import json

import pytest
import torch
from calibration.test_calibrate import FEW, dit

from qdiff_diffusers import AQConfig, Calibration, ConfigError, RTNConfig, SVDQuantConfig, Tuning, VQConfig, quantize
from qdiff_diffusers.calibration import tuning as tuning_module

CONFIGS = {
    "aq, codes re-encoded": (AQConfig(bits=2), {}),
    "vq, candidates": (VQConfig(bits=2), {"assignments": "candidates"}),
    "rtn, roundings": (RTNConfig(bits=2), {"assignments": "rounding"}),
    "svdquant, fixed codes": (SVDQuantConfig(bits=4, rank=4, activations="int8"), {"assignments": "fixed", "lr": 3e-3}),
}


def tuned(config, pipe, folder, **tuning) -> list[dict]:
    """The log of a calibration's tuning."""
    calibration = Calibration(**FEW, hessian=False, tuning=Tuning(steps=20, **tuning))
    log = json.loads((quantize(pipe, config, folder, calibration=calibration) / "transformer" / "calibration.json").read_text())
    return [entry for entry in log if entry["stage"] == "tuned"]


@pytest.mark.parametrize("objective", ["model", "blocks"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tuning_in_bfloat16_lowers_the_loss_as_far_as_in_float32(name, objective, tmp_path, monkeypatch):
    config, settings = CONFIGS[name]
    dtypes: set[torch.dtype] = set()
    original = tuning_module.Tuner.state

    def state(tuner: tuning_module.Tuner) -> dict[str, torch.Tensor]:
        found = original(tuner)
        dtypes.update(tensor.dtype for tensor in found.values())
        return found

    monkeypatch.setattr(tuning_module.Tuner, "state", state)
    logs = [tuned(config, dit(), tmp_path / p, objective=objective, precision=p, **settings) for p in ("float32", "bfloat16")]
    for exact, rough in zip(*logs, strict=True):
        assert (exact["precision"], rough["precision"]) == ("float32", "bfloat16")
        assert rough["loss_before"] == exact["loss_before"] and rough["kept"]
        gained = [1 - entry["loss_after"] / entry["loss_before"] for entry in (exact, rough)]
        assert gained[1] > gained[0] - 0.05
    assert torch.float32 in dtypes and torch.bfloat16 not in dtypes


@pytest.mark.parametrize("able", [False, True])
def test_the_processor_decides_if_nobody_else_does(able, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (end,) = tuned(RTNConfig(bits=2), dit(), tmp_path / "out")
    assert end["precision"] == ("bfloat16" if able else "float32")


def test_a_model_of_16_bits_computes_as_it_always_does(tmp_path, monkeypatch):
    contexts = []
    monkeypatch.setattr(torch, "autocast", lambda *args: contexts.append(args))
    (end,) = tuned(RTNConfig(bits=2), dit().to(torch.bfloat16), tmp_path / "out", precision="bfloat16")
    assert not contexts and end["precision"] == "bfloat16"


def test_other_precisions_are_refused():
    with pytest.raises(ConfigError, match="precision must be one of auto, bfloat16, float32, got 'float16'"):
        Tuning(precision="float16")
