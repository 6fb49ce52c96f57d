"""diffusers' own quantization test mixins, from a checkout, over tiny local models instead of downloads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
from classes import class_walk

from qdiff_diffusers import QDiffConfig
from qdiff_diffusers.layers import PackedLayer

VARIABLE = "QDIFF_DIFFUSERS_CHECKOUT"
PACKAGE = "diffusers_tests"  # under a name of its own: this repository has a folder "tests" too
MIXINS = ("QuantizationTesterMixin", "QuantizationCompileTesterMixin")
BACKEND = os.environ.get("QDIFF_UPSTREAM_BACKEND", "aot_eager")

MODELS = {
    "Flux": "FluxTransformer2DModel",
    "Flux2": "Flux2Transformer2DModel",
    "SD3": "SD3Transformer2DModel",
    "Wan": "WanTransformer3DModel",
    "QwenImage": "QwenImageTransformer2DModel",
    "DiT": "DiTTransformer2DModel",
    "PixArt": "PixArtTransformer2DModel",
    "UNet": "UNet2DConditionModel",
}
# The mixins want every linear layer quantized.
METHODS: dict[str, dict[str, Any]] = {
    "aq": {"method": "aq", "num_codebooks": 1, "codebook_bits": 8, "vector_size": 4, "codebook": "shared", "effort": 0},
    "vq": {"method": "vq", "codebook_bits": 4, "vector_size": 2, "restarts": 1},
    "fp": {"method": "fp", "weight_format": "nvfp4"},
    "svdquant": {"method": "svdquant", "bits": 4, "rank": 2, "rounds": 1},
    "rtn": {"method": "rtn", "bits": 4, "group_size": 16},
}
EVERYTHING = {"keep_outer_layers": False}
EXCLUDED = ["to_q"]

# Tests that cannot pass: what they say then, and why; a "*" stands for every model. One that passes after all is an error.
KNOWN: dict[tuple[str, str], tuple[str, str]] = {
    ("quantization_device_map", "DiT"): (
        "does not support `device_map='auto'`",
        "the model class has no _no_split_modules, so diffusers refuses device_map='auto' for it, quantized or not",
    ),
    ("torch_compile_with_group_offload", "DiT"): (
        "does not support group offloading",
        "the model class has _supports_group_offloading = False, so diffusers refuses it, quantized or not",
    ),
}


def settings(method: str, model: str) -> dict[str, Any]:
    """The config's arguments for one of ``METHODS`` and one of ``MODELS``."""
    return METHODS[method] | EVERYTHING


def known(test: str, model: str) -> tuple[str, str] | None:
    """What a test that cannot pass says, and why it cannot; ``None`` for all others."""
    return KNOWN.get((test, model)) or KNOWN.get((test, "*"))


def checkout() -> Path | None:
    """The checkout that the environment variable names."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


@functools.cache
def upstream() -> Any:
    """The checkout's ``tests.models.testing_utils.quantization``."""
    root = checkout()
    assert root is not None
    init = root / "tests" / "__init__.py"
    if not init.is_file():
        raise FileNotFoundError(
            f"{VARIABLE}={root} holds no {init.relative_to(root)}; it must be a checkout of diffusers' repository"
        )
    spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{PACKAGE}.models.testing_utils.quantization")


def tests() -> list[tuple[str, str]]:
    """(mixin, test) for every ``_test_...`` of the two mixins, so that new ones upstream appear by themselves."""
    found = []
    for mixin in MIXINS:
        kind = getattr(upstream(), mixin)
        found += [(mixin, name.removeprefix("_test_")) for name in vars(kind) if name.startswith("_test_")]
    return found


def adapter(mixin: str, name: str, folder: Path) -> Any:
    """An instance of the mixin for one of ``MODELS``, saved in ``folder``."""

    class Adapter(getattr(upstream(), mixin)):  # type: ignore[misc]
        model_class = getattr(importlib.import_module("diffusers"), MODELS[name])
        pretrained_model_name_or_path = str(folder)
        torch_dtype = torch.float32

        def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
            config = QDiffConfig(**config_kwargs)
            model = self.model_class.from_pretrained(str(folder), quantization_config=config, **extra)
            model.compile = functools.partial(model.compile, backend=BACKEND)
            return model

        def _verify_if_layer_quantized(self, name: str, module: Any, config_kwargs: dict[str, Any]) -> None:
            assert isinstance(module, PackedLayer), f"{name} is a {type(module).__name__}"

        def get_dummy_inputs(self) -> dict[str, Any]:
            torch.manual_seed(1)
            inputs = class_walk.configurations()[MODELS[name_of_model]]["inputs"]
            return {key: class_walk.decode(value) for key, value in inputs.items() if key != "return_dict"}

    name_of_model = name
    return Adapter()


def call(instance: Any, test: str, config_kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Run one test with the arguments it asks for."""
    function = getattr(instance, f"_test_{test}")
    offered = {"config_kwargs": config_kwargs, "tmp_path": tmp_path, "modules_to_not_convert": EXCLUDED}
    instance.setup_method()
    try:
        function(**{key: value for key, value in offered.items() if key in inspect.signature(function).parameters})
    finally:
        instance.teardown_method()
