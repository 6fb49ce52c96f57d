"""Models that are quantized already, by qdiff or another package: recognised, described and refused as a source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn

from ..config import QDiffMethod
from ..errors import ConfigError
from .folders import CONFIG
from .provenance import is_hub_name
from .source_weights import read_source_files

FILES = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
# Settings in which other backends name the bits or the number format.
DETAILS = ("bits", "w_bit", "nbits", "weights_dtype", "weights", "quant_type", "precision", "fmt", "format")


def check_source(source: str | Path, component: str, loading: Mapping[str, Any], dense: bool) -> None:
    """Refuse to quantize a stored model that is quantized already; nothing is downloaded but its config.json.

    Args:
        source: folder or Hub name of a pipeline or model.
        component: name of the pipeline's component, "" for a model.
        loading: ``variant``, ``use_safetensors`` and ``revision``, as for ``from_pretrained``.
        dense: whether the weights will be read without a quantizer, so that no scales are applied; checked for folders only.

    Raises:
        ConfigError: says how the model is quantized and what to start from.
        CheckpointError: the weights are stored in an unknown format.
    """
    owner = f"{component} of {source}" if component else str(source)
    settings = _stored_config(source, component, loading.get("revision"))
    if quantization := settings.get("quantization_config"):
        refuse_quantization(quantization, owner, settings.get("_name_or_path"))
    if dense and Path(source).is_dir():
        check_dense(source, component, loading)


def check_dense(source: str | Path, component: str, loading: Mapping[str, Any]) -> None:
    """Refuse weights in a folder that have scales which its library would not apply.

    Raises:
        ConfigError: names such a weight, and what to start from instead.
        CheckpointError: the weights are stored in an unknown format.
    """
    files = _weight_files(Path(source, component), loading)
    if not files or _stored_config(source, component, None).get("quantization_config"):
        return  # nothing to read, or another backend reads it
    if names := sorted(read_source_files(files).scales):
        other = f"quantize {component} too, without calibration" if component else "quantize without calibration"
        raise ConfigError(
            f"{names[0]} in {files[0].parent}, and {len(names) - 1} more, are stored in 8 bits with scales, which are applied only "
            f"to what is quantized while it loads: {other}, or start from the model in 16 or 32 bits"
        )


def _stored_config(source: str | Path, component: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model, in a folder or on the Hub; empty if there is none."""
    name = f"{component}/{CONFIG}" if component else CONFIG
    try:
        path = Path(source, name) if Path(source).is_dir() else Path(hf_hub_download(str(source), name, revision=revision))
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # from_pretrained says what is wrong with it
        return {}
    return settings if isinstance(settings, dict) else {}


def _weight_files(folder: Path, loading: Mapping[str, Any]) -> list[Path]:
    """The files in a folder that ``from_pretrained`` may read weights from."""
    variant = loading.get("variant")
    found: list[Path] = []
    for suffix in (".safetensors", ".bin"):
        if found or (loading.get("use_safetensors") is (suffix == ".bin")):
            continue
        matches = [(path, FILES.fullmatch(path.name)) for path in sorted(folder.glob(f"*{suffix}"))]
        named = {wanted: [path for path, match in matches if match and match["variant"] == wanted] for wanted in (variant, None)}
        found = named[variant] or named[None]
    return found


def refuse_quantized_model(model: nn.Module, owner: str) -> None:
    """Refuse a model in memory that cannot be quantized: it is quantized already, has adapters, or lacks its weights.

    Raises:
        ConfigError: says what is wrong with the model and what to start from.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(model, "config", None)
    config = getattr(quantizer, "quantization_config", None) or getattr(settings, "quantization_config", None)
    if getattr(model, "is_quantized", False) or config:
        refuse_quantization(config or {}, owner, getattr(settings, "_name_or_path", None))
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise ConfigError(
            f"{adapted} of {owner} has an adapter, and a packed layer under it could be neither unfused nor loaded again; "
            "fuse_lora() and unload_lora_weights() (of a model: unload_lora()) make the adapter part of the weights, unloading "
            "alone leaves it for later"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ConfigError(
                f"{name} of {owner} is on the meta device, so there is no weight to quantize; load the model's weights, without "
                "offloading"
            )
        is_weight = name.rpartition(".")[2] in ("weight", "bias")
        if is_weight and (type(tensor) is not nn.Parameter or not tensor.is_floating_point() or tensor.dtype.itemsize == 1):
            kind = tensor.dtype if type(tensor) is nn.Parameter else type(tensor.data).__name__
            raise ConfigError(f"{name} of {owner} is a {kind}, no dense weight; start from the model in 16 or 32 bits")


def refuse_quantization(quantization: Any, owner: str, name: Any) -> None:
    settings = settings_of(quantization)
    base = settings.get("provenance", {}).get("base_model") or (name if is_hub_name(name) else None)
    raise ConfigError(
        f"{owner} is quantized already ({describe_quantization(quantization)}); quantizing it again would keep its errors and add "
        f"more. Start from the full-precision model{f', {base}' if base else ''}"
    )


def describe_quantization(quantization: Any) -> str:
    """Short description of any backend's ``quantization_config``, a dictionary or an object: "rtn at 4 bits, by qdiff"."""
    settings = settings_of(quantization)
    method = str(getattr(value := settings.get("quant_method"), "value", value) or "an unknown method")
    if method == QDiffMethod.QDIFF.value:
        return f"{settings.get('method')}{_details(settings, (*DETAILS, 'weight_format'))}, by qdiff"
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"{method} at {4 if settings.get('load_in_4bit') else 8} bits"
    return method + _details(settings, DETAILS)


def _details(settings: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = {name: settings[name] for name in names if isinstance(settings.get(name), int | float | str)}
    bits = next((found.pop(name) for name in ("bits", "w_bit", "nbits") if isinstance(found.get(name), int | float)), None)
    at = "" if bits is None else f" at {bits:g} bits"
    return at + "".join(f", {name} {value}" for name, value in found.items())


def settings_of(quantization: Any) -> dict[str, Any]:
    if isinstance(quantization, Mapping):
        return dict(quantization)
    try:
        return dict(quantization.to_dict())
    except (AttributeError, TypeError, ValueError):  # to_dict of diffusers' BFL config copies what cannot be
        return {key: value for key, value in vars(quantization).items() if not key.startswith("_")}
