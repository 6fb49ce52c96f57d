"""Every transformer and UNet class of the installed diffusers, through quantizing, saving, reloading and a forward pass.

``tiny_configs.json`` holds a tiny configuration and inputs per class, taken from diffusers' own model tests (Apache-2.0) or made in
their likeness. A class that it lacks is reported as such, so that the classes of a newer diffusers show up by themselves.
"""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.layers import PackedLayer

CONFIGS_FILE = Path(__file__).parent / "tiny_configs.json"
METHODS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(bits=8, group_size=16),
    "svdquant": lambda: SVDQuantConfig(bits=8, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=8, group_size=16),
}
# Relative error of the output that counts as working: the models are random, so the low-bit methods get far more room.
TOLERANCE = {"aq": 1.0, "vq": 1.0, "fp": 0.2, "svdquant": 0.1, "rtn": 0.1}
KINDS = ("Transformer", "UNet", "DiT", "UVit")
OTHERS = ("DControlNet", "MultiControlNet", "Vae")


class Outcome(NamedTuple):
    """What became of one class under one method."""

    status: str  # "works", "no tiny configuration yet", "nothing to quantize", "not run" or "fails"
    reason: str = ""
    packed: int = 0
    error: float | None = None


def class_names() -> list[str]:
    """Names of the transformer and UNet classes that diffusers exports."""
    found = []
    for name in dir(diffusers):
        if not any(kind in name for kind in KINDS) or any(kind in name for kind in OTHERS):
            continue
        value = getattr(diffusers, name)
        if inspect.isclass(value) and issubclass(value, ModelMixin) and type(value).__name__ != "DummyObject":
            found.append(name)
    return found


def configurations() -> dict[str, Any]:
    """The tiny configurations by class name."""
    return json.loads(CONFIGS_FILE.read_text())


def decode(value: Any) -> Any:
    """One input as the file describes it."""
    if "randn" in value:
        return torch.randn(value["randn"])
    if "randint" in value:
        low, high = value["randint"]
        return torch.randint(low, high, value["shape"], dtype=getattr(torch, value["dtype"]))
    if "fill" in value:
        return torch.full(value["shape"], value["fill"], dtype=getattr(torch, value["dtype"]))
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if "dtype_value" in value:
        return getattr(torch, value["dtype_value"])
    if "dict" in value:
        # JSON has no integer keys
        return {int(key) if key.isdigit() else key: decode(item) for key, item in value["dict"].items()}
    if "object" in value:
        module, _, name = value["object"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**value["arguments"])
    for kind in (list, tuple):
        if kind.__name__ in value:
            return kind(decode(item) for item in value[kind.__name__])
    return value["value"]


def make(name: str, configuration: dict[str, Any]) -> nn.Module:
    """The tiny model; layers that start at zero are filled, so that every layer has a say in the output."""
    torch.manual_seed(0)
    model = getattr(diffusers, name).from_config(configuration["config"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


@torch.no_grad()
def forward(model: nn.Module, configuration: dict[str, Any]) -> torch.Tensor:
    """All tensors of the model's output, flattened into one, in float32."""
    torch.manual_seed(1)
    inputs = {key: decode(value) for key, value in configuration["inputs"].items()}
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs["return_dict"] = False
    torch.manual_seed(2)
    return torch.cat([t.flatten().float() for t in _tensors(model(**inputs))])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def walk(name: str, method: str, known: dict[str, Any] | None = None) -> Outcome:
    """Quantize, save, reload and run one class; never raises."""
    configuration = (configurations() if known is None else known).get(name)
    if configuration is None:
        return Outcome("no tiny configuration yet")
    try:
        exact = forward(make(name, configuration), configuration)
    except Exception as error:
        return Outcome("not run", f"the dense model does not run here: {_first_line(error)}")
    try:
        return _quantized(name, configuration, METHODS[method](), exact, TOLERANCE[method])
    except Exception as error:
        return Outcome("fails", _first_line(error))


def _quantized(name: str, configuration: dict[str, Any], config: QDiffConfig, exact: torch.Tensor, tolerance: float) -> Outcome:
    kind = getattr(diffusers, name)
    with tempfile.TemporaryDirectory() as folder:
        make(name, configuration).save_pretrained(f"{folder}/dense")
        model = kind.from_pretrained(f"{folder}/dense", quantization_config=config)
        packed = sum(isinstance(module, PackedLayer) for module in model.modules())
        if not packed:
            return Outcome("nothing to quantize", _why_not(model))
        output = forward(model, configuration)
        model.save_pretrained(f"{folder}/packed")
        reloaded = forward(kind.from_pretrained(f"{folder}/packed"), configuration)
    error = float((output - exact).norm() / exact.norm().clamp_min(1e-12))
    if not torch.isfinite(output).all():
        return Outcome("fails", "the output is not finite", packed, error)
    if not torch.allclose(reloaded, output, atol=1e-4, rtol=1e-3):
        return Outcome("fails", "the reloaded model gives another output", packed, error)
    if error > tolerance:
        return Outcome("fails", f"relative error {error:.2f}", packed, error)
    return Outcome("works", "", packed, error)


def _why_not(model: Any) -> str:
    reasons = sorted(set(model.config.quantization_config.skipped.values()))
    return "; ".join(reasons) or "no layer with a weight"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error).strip() else ''}"
