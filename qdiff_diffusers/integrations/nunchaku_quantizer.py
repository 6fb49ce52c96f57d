"""``from_pretrained`` of a ``nunchaku_lite`` folder, exactly, into qdiff's layers if a qdiff config is passed.

diffusers merges the config that is stored with the one that is passed, and lets the stored one decide; here the passed one chooses
the backend. Without it diffusers' own NunchakuLite loads the folder, where it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig, QDiffMethod, SVDQuantConfig
from ..convert.importing import Import, Reader, described, prepare
from ..convert.layouts import plan_lite
from ..convert.nunchaku import Part, find_header, spec_of
from ..convert.nunchaku_folder import check_lite, is_lite, lite_targets, nearest_config
from ..convert.stream import Source
from ..errors import CheckpointError, ConfigError
from ..formats import dtype_name
from ..model.packing import prepare_packed_layers
from .diffusers_quantizer import QDiffQuantizer
from .passed_config import obey_or_refuse


class NunchakuImport(QuantizationConfigMixin):
    """The stored config of a ``nunchaku_lite`` folder that is to be loaded into qdiff's layers."""

    quant_method = QDiffMethod.NUNCHAKU  # type: ignore[assignment]

    def __init__(self, stored: dict[str, Any]) -> None:
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, "stored": self.stored}

    to_diff_dict = to_dict


def merge_configs(merge: Any, cls: Any, quantization_config: Any, quantization_config_from_args: Any, **kwargs: Any) -> Any:
    """``merge_quantization_configs`` of diffusers' auto quantizer, in which a qdiff config that is passed chooses the backend."""
    if isinstance(quantization_config_from_args, QDiffConfig | Quantization) and is_lite(quantization_config):
        _check_passed(quantization_config_from_args)
        stored = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        return NunchakuImport(stored)
    return obey_or_refuse(merge, cls, quantization_config, quantization_config_from_args, **kwargs)


def _check_passed(config: QDiffConfig | Quantization) -> None:
    """Refuse settings in a config that is passed: the weights are quantized already."""
    if config.settings() != {"method": SVDQuantConfig.method_name}:
        settings = ", ".join(f"{key}={value!r}" for key, value in config.settings().items())
        raise ConfigError(
            f"this model was quantized by SVDQuant and is stored in Nunchaku's format; {settings} would quantize it again. Pass "
            "SVDQuantConfig() without settings to load it as it is"
        )


class NunchakuQuantizer(QDiffQuantizer):
    """Fills packed layers from a ``nunchaku_lite`` checkpoint."""

    def __init__(self, quantization_config: NunchakuImport, **kwargs: Any) -> None:
        self.lite = quantization_config.stored
        self.targets_of_lite = lite_targets(self.lite)
        compute = self.lite.get("compute_dtype")
        dtype = dtype_name(compute) if compute else "bfloat16"
        super().__init__(SVDQuantConfig(compute_dtype=dtype), pre_quantized=True)  # type: ignore[call-arg]

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Names that the tensors will have in qdiff's layers."""
        self.source = Source(map(Path, checkpoint_files))
        if lost := sorted(set(loaded_keys) - self.source.infos.keys()):
            raise CheckpointError(f"no file holds {', '.join(lost[:5])}, which the index lists; the checkpoint is incomplete")
        self.origin = {}
        targets = set(self.targets_of_lite)
        kept = [key for key in loaded_keys if key.rpartition(".")[0] not in targets]
        return kept + [f"{name}.{leaf}" for name in self.targets_of_lite for leaf in self._leaves(name)]

    def _leaves(self, name: str) -> list[str]:
        codes = self.source.infos.get(f"{name}.qweight")
        if codes is None:
            raise CheckpointError(f"the checkpoint lacks tensor {name}.qweight; it is incomplete")
        rows = codes.shape[0] * (4 if codes.dtype == torch.int32 else 1)
        header = find_header(Part(name, rows, codes.shape[-1] * 2), self.source.infos)
        leaves = list(spec_of([header]).tensors((rows, codes.shape[-1] * 2)))
        return leaves + (["bias"] if "bias" in header.infos else [])

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        plan = plan_lite(model, self.targets_of_lite, self.source.infos)
        self.imported: Import = prepare(model, plan, self.source)
        check_lite(self.lite, self.imported)
        config = nearest_config(self.imported).computing_in(self.quantization_config.compute_dtype)
        self.quantization_config = described(config, model, self.imported.layers, "Nunchaku")
        prepare_packed_layers(model, self.imported.layers, self.compute_dtype)
        model.register_to_config(quantization_config=self.quantization_config)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Replace Nunchaku's tensors by qdiff's, layer by layer: all of a layer's once the file with its codes is read."""
        reader = Reader(self.imported, self.source)
        for target in self.imported.plan.targets:
            codes_here = f"{target.module}.qweight" in state_dict
            for key in [key for key in state_dict if key.rpartition(".")[0] == target.module]:
                del state_dict[key]
            if codes_here:
                state_dict.update({f"{target.module}.{leaf}": tensor for leaf, tensor in reader.layer(target).items()})
        return state_dict
