"""The diffusers quantizer: the methods that diffusers' loader calls on a backend while it reads a model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from ..checkpoint.files import check_shapes, check_tensors, read_headers
from ..checkpoint.pages import release_pages
from ..checkpoint.provenance import new_provenance, origin_of, origin_of_model
from ..checkpoint.quantization import Quantization
from ..checkpoint.source_weights import EightBit, SourceWeights, defer_source_tensors, read_source_files
from ..config import FORMAT_VERSION, QDiffConfig
from ..errors import CheckpointError, ConfigError
from ..formats import TensorInfo, dtype_name
from ..layers import set_tensor
from ..model.fused import fused_with_own_scales
from ..model.packing import (
    check_compute_dtype,
    check_loaded,
    dequantize_model,
    packed_layers,
    prepare_packed_layers,
    quantize_layer,
    release_checkpoint,
    without_adapters,
)
from ..model.selection import select_layers
from .record_keeping import KeepsRecord

logger = logging.get_logger(__name__)


class QDiffQuantizer(KeepsRecord, DiffusersQuantizer):  # type: ignore[misc]
    """Quantizes layer by layer while diffusers reads a checkpoint, or fills packed layers from a quantized one.

    On the fly a layer stays an ``nn.Linear`` on the meta device until its weight arrives, is quantized and dropped. For a
    quantized checkpoint the packed layers stand ready, with the shapes that config.json promises, before anything is read.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    source: SourceWeights | None = None  # while a dense checkpoint is read

    def __init__(self, quantization_config: QDiffConfig | Quantization, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.begin_record(quantization_config)

    @classmethod
    def of_model(cls, model: nn.Module, config: QDiffConfig) -> QDiffQuantizer:
        """A quantizer for a model in memory, with the layers to pack chosen. Call :meth:`attach` once they are packed."""
        quantizer = cls(config, pre_quantized=False)
        quantizer.update_torch_dtype(next(p.dtype for p in model.parameters() if p.is_floating_point()))
        keep = [name for name in getattr(model, "_keep_in_fp32_modules", None) or () if name]
        quantizer.origin = origin_of_model(str(getattr(model.config, "_name_or_path", None) or ""))
        quantizer._select(model, keep)
        return quantizer

    def attach(self, model: nn.Module) -> None:
        """Bring ``model``, whose layers have been packed, into the state in which loading a quantized checkpoint leaves a model."""
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = self.quantization_config.quant_method  # type: ignore[assignment]
        model.hf_quantizer = self  # type: ignore[assignment]
        self.follow(packed_layers(model))
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.quantization_config.check_uncalibrated()
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ConfigError(
                'qdiff cannot place layers on "disk" through device_map; leave "disk" out of it (a packed model is small), '
                "or use diffusers' group offloading with offload_to_disk_path"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        stored = self.quantization_config.compute_dtype
        self.compute_dtype = torch_dtype or (getattr(torch, stored) if stored else torch.float32)
        check_compute_dtype(self.compute_dtype)
        self.quantization_config.compute_dtype = dtype_name(self.compute_dtype)
        return self.compute_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def get_cuda_warm_up_factor(self) -> int:
        return 8 if self.pre_quantized else max(2, round(16 / (self.quantization_config.bits or 4)))

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check every packed tensor's name, shape and dtype in the checkpoint's files before data is read."""
        if self.pre_quantized:
            self.headers = headers = read_headers(checkpoint_files)
            check_tensors(self.quantization_config.layers, headers)
            if len(checkpoint_files) > 1 and (lost := sorted(set(loaded_keys) - headers.keys())):
                raise CheckpointError(f"no shard holds {', '.join(lost[:5])}, which the index lists; the checkpoint is incomplete")
            self.origin: dict[str, str] = {}
            return loaded_keys
        self.origin = origin_of(checkpoint_files[0])
        self.source = read_source_files(checkpoint_files)
        return [key for key in loaded_keys if key not in self.source.companions]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self, "origin"):  # from_single_file, whose first sight of a checkpoint this is
            self._check_single_file(state_dict)
        elif self.source is not None:
            self.source.defer(state_dict)
        return state_dict

    def _check_single_file(self, state_dict: dict[str, Any]) -> None:
        """Find out whether a single file is quantized, as from_single_file always claims; hide packed names from its converters."""
        layers = self.quantization_config.layers
        self.pre_quantized = any(key.endswith(".codes") for key in state_dict)
        if not self.pre_quantized:
            self.quantization_config = self.quantization_config.requested()
            self.source = defer_source_tensors(state_dict)
            return
        if not layers:
            raise ConfigError(
                "this file is already quantized, and from_single_file does not read how; load its folder with from_pretrained, or "
                "pass quantization_config=qdiff_diffusers.inspect_checkpoint(folder).config and config=folder"
            )
        self.headers = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in state_dict.items()}
        check_tensors(layers, self.headers)
        # diffusers takes a file whose keys are not the dense model's for one in another program's layout.
        names = [f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.spec.tensors(layer.shape)]
        self.held_back = {name: state_dict.pop(name) for name in names}
        state_dict.update({f"{name}.weight": torch.empty(0) for name in layers})

    def _give_back(self, state_dict: dict[str, Any]) -> None:
        """Restore the names that ``_check_single_file`` hid from the converters."""
        for name in self.quantization_config.layers:
            del state_dict[f"{name}.weight"]
        state_dict.update(self.__dict__.pop("held_back"))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        keep = [name for name in kwargs.get("keep_in_fp32_modules") or () if name]
        if not hasattr(self, "origin") and "held_back" not in self.__dict__:
            self._check_single_file(kwargs["state_dict"])  # diffusers before 0.42 shows a single file here for the first time
        if self.pre_quantized:
            if "held_back" in self.__dict__:
                self._give_back(kwargs["state_dict"])
            prepare_packed_layers(model, self.quantization_config.layers, self.compute_dtype)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            check_shapes(shapes, self.__dict__.pop("headers", {}))
        else:
            self._choose_layers(model, keep)
        model.register_to_config(quantization_config=self.quantization_config)

    def _choose_layers(self, model: nn.Module, keep: list[str]) -> None:
        if self.source is not None:
            self.source.check_floating(model)
        self._select(model, keep)
        if any(config.target for config in self.targets.values()) and (groups := fused_with_own_scales(model, self.targets)):
            raise ConfigError(
                f"ComfyUI has {', '.join(groups[0])} in one weight with one scale, which cannot be found while they are loaded one "
                "by one; quantize with qdiff_diffusers.quantize(source, config, folder) or `qdiff quantize --for ...`"
            )
        self.keep = keep
        description = f"Quantizing ({self.quantization_config.method_name})"
        self.progress = logging.tqdm(total=len(self.targets), desc=description, unit="layer", delay=2)

    def _select(self, model: nn.Module, keep: list[str]) -> None:
        record = self.quantization_config
        self.targets, record.skipped = select_layers(model, record.config, keep)
        if not self.targets:
            logger.warning("qdiff found no layer to quantize in %s", type(model).__name__)
        record.provenance = new_provenance(type(model).__name__) | getattr(self, "origin", {})

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        module, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            return (leaf == "weight" and module in self.targets) or isinstance(state_dict.get(param_name), EightBit)
        layer = self.quantization_config.layers.get(module)
        return layer is not None and leaf in layer.spec.tensors(layer.shape)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        name, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(name)
        raw = state_dict[param_name]  # param_value has already been cast to the model's dtype
        if self.pre_quantized:
            set_tensor(module, leaf, raw.to(target_device))
            return
        weight = raw.decode(target_device) if isinstance(raw, EightBit) else raw.to(target_device)
        state_dict[param_name] = torch.empty(0)  # the dense weight is not needed again: let its memory go
        if leaf != "weight" or name not in self.targets:
            dtype = torch.float32 if any(part in param_name.split(".") for part in self.keep) else self.compute_dtype
            set_module_tensor_to_device(model, param_name, target_device, value=weight.to(dtype), dtype=dtype)
        else:
            stored = quantize_layer(module, name, weight, self.targets[name], self.compute_dtype)
            self.quantization_config.layers[name] = stored
            self.progress.update()
        for tensor in raw.stored() if isinstance(raw, EightBit) else [raw]:
            release_pages(tensor)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized and missing_keys:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(missing_keys)[:5])}; it is incomplete")
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_loaded(model)
        release_checkpoint(model)
        self.follow(packed_layers(model))
        if not self.pre_quantized:
            self.progress.close()
            del self.progress  # a bar holds a terminal, which could not be copied or pickled with the model
            if self.source is not None:
                self.source.check_read()
                self.source = None
            left = sorted(set(self.targets) - set(self.quantization_config.layers))
            if left:
                raise CheckpointError(f"the checkpoint has no weight for {', '.join(left[:5])}; it is incomplete")
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        plain = without_adapters(state_dict)
        if plain is not state_dict:
            logger.warning("LoRA adapters that are loaded but not fused are not saved with the model; save_lora_adapter saves them")
        return plain, {"qdiff_format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_model(model)
        self.follow({})
        # The base class leaves quantization_config behind, and a model saved later would claim to be quantized.
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(kept)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        # Converting layers changes the very dictionaries that other loading threads iterate over.
        return self.pre_quantized

    @property
    def is_serializable(self) -> bool:
        return True
