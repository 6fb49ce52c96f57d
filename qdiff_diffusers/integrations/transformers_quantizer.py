"""The transformers quantizer, for text encoders: methods that transformers' loader calls on a backend while it reads a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from ..checkpoint.files import check_tensors, read_headers
from ..checkpoint.pages import release_pages
from ..checkpoint.provenance import new_provenance, origin_of
from ..checkpoint.quantization import Quantization
from ..checkpoint.source_weights import SourceWeights, read_source_files, read_source_tensors
from ..config import QDiffConfig
from ..errors import CheckpointError, QDiffError
from ..formats import dtype_name
from ..layers import PackedLayer, dense_layer
from ..layers.offloading import without_group_offloading
from ..model.packing import (
    check_compute_dtype,
    check_loaded,
    dequantize_model,
    packed_layers,
    prepare_packed_layers,
    quantize_layer,
    release_checkpoint,
)
from ..model.selection import select_layers
from ..model.tied_weights import tie, tie_dense, untie, weight_holder
from .record_keeping import KeepsRecord


class QuantizeOp(ConversionOps):
    """Quantizes one weight as it is read."""

    def __init__(self, quantizer: QDiffTransformersQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        ((_, value),) = input_dict.items()
        name = full_layer_name.rpartition(".")[0]
        try:
            self.quantizer.quantize(model.get_submodule(name), name, value[0] if isinstance(value, list) else value)
        except QDiffError as error:
            self.quantizer.failure = error  # transformers only notes it, and goes on
            raise
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class QDiffTransformersQuantizer(KeepsRecord, HfQuantizer):  # type: ignore[misc]
    """Quantizes on load or fills packed layers, like :class:`QDiffQuantizer`."""

    requires_calibration = False
    source: SourceWeights | None = None  # while a dense checkpoint is read
    failure: QDiffError | None = None

    def __init__(self, quantization_config: QDiffConfig | Quantization, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.begin_record(quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.quantization_config.check_uncalibrated()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.compute_dtype = dtype or torch.float32
        check_compute_dtype(self.compute_dtype)
        self.quantization_config.compute_dtype = dtype_name(self.compute_dtype)
        return self.compute_dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or ()
        if self.pre_quantized:
            layers = self.quantization_config.layers
            headers = read_headers(files)
            # transformers renames the modules of some models when it saves them: those layers are checked once loaded.
            check_tensors({name: layer for name, layer in layers.items() if f"{name}.codes" in headers}, headers)
            prepare_packed_layers(model, layers, self.compute_dtype)
            self._untie(model, layers)
            return
        if files:
            self.source = read_source_files(files)
            self.source.check_floating(model)
        keep = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules) or []
        targets, self.quantization_config.skipped = select_layers(model, self.quantization_config.config, list(keep))
        self.quantization_config.provenance = new_provenance(type(model).__name__) | (origin_of(files[0]) if files else {})
        # The file holds a shared weight once.
        self.targets = {weight_holder(model, name): config for name, config in targets.items()}
        for name in self.targets:
            self.quantization_config.skipped.pop(name, None)
        self._untie(model, self.targets)

    def read_source(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """What transformers loads instead of a dense checkpoint's ``tensors``; called by ``checkpoint_checks.decode_sources``."""
        if self.pre_quantized:
            return tensors
        if self.source is None:  # from_pretrained(None, state_dict=...)
            self.source = read_source_tensors(tensors)
        return self.source.defer_slices(tensors)

    def _untie(self, model: Any, packed: Iterable[str]) -> None:
        """Empty the layers that share the weight of a packed one."""
        self.tied = {name: names for name in packed if (names := untie(model, name))}
        for name in (name for names in self.tied.values() for name in names):
            self.quantization_config.skipped.pop(name, None)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and module in self.targets

    def get_quantize_ops(self) -> QuantizeOp:
        return QuantizeOp(self)

    def quantize(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Quantize one layer and convert it in place."""
        stored = quantize_layer(module, name, weight, self.targets[name], self.compute_dtype)
        for tensor in (*cast(PackedLayer, module).packed_tensors().values(), module):
            tensor._is_hf_initialized = True  # type: ignore[union-attr]  # or transformers would initialise it afresh
        self.quantization_config.layers[name] = stored
        release_pages(weight)
        if self.source is not None:
            self.source.release_read()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.source is not None:
            self.source.check_read()
            self.source = None
        for name, names in self.tied.items():
            tie(model, name, names)
        check_loaded(model)
        release_checkpoint(model)
        tied = {name for names in self.tied.values() for name in names}
        self.follow({name: layer for name, layer in packed_layers(model).items() if name not in tied})
        if missing := self._missing(model):
            raise CheckpointError(f"the checkpoint lacks {', '.join(missing[:5])}; it is incomplete")
        return model

    def _missing(self, model: Any) -> list[str]:
        """Names of tensors that the files lack. transformers only logs them, and fills them with random numbers."""
        if not self.pre_quantized:
            return sorted(f"{name}.weight" for name in set(self.targets) - set(self.quantization_config.layers))
        ignored = model._keys_to_ignore_on_load_missing or []
        tensors = model.state_dict(keep_vars=True).items()
        unread = (name for name, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False))
        return sorted(name for name in unread if not any(re.search(pattern, name) for pattern in ignored))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Tensors and metadata to save; a packed weight that layers share is saved once."""
        tied = {name for names in self.tied.values() for name in names}
        if not tied:
            return None, {}
        return {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in tied}, {}

    def make_dense(self, model: Any, names: list[str]) -> None:
        """Make some packed layers dense, together with those that share their weight; the others stay packed."""
        sources = {name: source for source, tied in self.tied.items() for name in tied}
        for name in dict.fromkeys(sources.get(name, name) for name in names):
            tied = self.tied.pop(name, [])
            layers = {id(layer): layer for layer in map(model.get_submodule, (name, *tied))}  # transformers may have merged them
            for layer in layers.values():
                dense_layer(layer)
            tie_dense(model, name, tied)
            del self.packed[name]
            self.quantization_config.layers.pop(name)
            self.quantization_config.skipped |= dict.fromkeys((name, *tied), "made dense to add tokens")

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        with without_group_offloading(model):
            dequantize_model(model)
            for name, names in self.tied.items():
                tie_dense(model, name, names)
        self.tied = {}
        self.follow({})
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True
