"""From a plan to stored layers: the steps that the imports of all formats share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..checkpoint.provenance import new_provenance
from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig
from ..errors import CheckpointError
from ..formats import TensorInfo
from ..formats.layer_table import StoredLayer
from ..model.selection import WEIGHTED
from .layouts import Copied, Plan, Target
from .logical import concatenate_columns
from .nunchaku import Header, find_header, read_part, spec_of
from .stream import Source


class Import(NamedTuple):
    """Everything that is known before any weight is read.

    Attributes:
        plan: where each tensor of the model is in the source.
        headers: headers of the source layers, by prefix.
        layers: the packed layers that they become, by module name.
        infos: shapes and dtypes of all tensors to write, in this order.
    """

    plan: Plan
    headers: dict[str, Header]
    layers: dict[str, StoredLayer]
    infos: dict[str, TensorInfo]


def prepare(model: nn.Module, plan: Plan, source: Source) -> Import:
    """Check all tensors of the source against the model.

    Raises:
        CheckpointError: names the first tensor that is missing, misshapen or of an unknown precision.
    """
    out = Import(plan, {}, {}, {})
    for target in plan.targets:
        headers = [out.headers.setdefault(part.prefix, find_header(part, source.infos)) for part in target.parts]
        try:
            layer = StoredLayer(spec_of(headers), target.shape, None)
            tensors = layer.spec.tensors(target.shape)
        except ValueError as error:
            raise CheckpointError(f"layer {target.module}: {error}") from error
        out.layers[target.module] = layer
        out.infos.update({f"{target.module}.{leaf}": info for leaf, info in tensors.items()})
        if getattr(model.get_submodule(target.module), "bias", None) is not None:
            out.infos[f"{target.module}.bias"] = TensorInfo(target.shape[:1], _bias_dtype(headers))
    out.infos.update({copy.name: TensorInfo(copy.shape, source.infos[copy.source].dtype) for copy in plan.copies})
    return out


def _bias_dtype(headers: list[Header]) -> torch.dtype:
    """Dtype of the bias: float32 if it is computed, as the sum of two biases or by removing "1 +"; else the stored dtype."""
    with_bias = [header for header in headers if "bias" in header.infos]
    if not with_bias:
        raise CheckpointError(f"the checkpoint lacks tensor {headers[0].part.prefix}.bias; it is incomplete")
    computed = len(headers) > 1 or any(header.part.splits > 1 for header in headers)
    return torch.float32 if computed else with_bias[0].infos["bias"].dtype


class Reader:
    """Reads the layers of an :class:`Import`."""

    def __init__(self, imported: Import, source: Source) -> None:
        self.imported, self.source = imported, source
        # The layers of a fused projection come one after the other.
        self._part = lru_cache(maxsize=1)(lambda prefix: read_part(imported.headers[prefix], source.get))

    def layer(self, target: Target) -> dict[str, Tensor]:
        """The tensors of one layer, packed ones and bias, by their names in the module.

        Raises:
            CheckpointError: the source holds numbers that the model's layer cannot store.
        """
        try:
            parts = [self._part(part.prefix).rows(target.rows.picked()) for part in target.parts]
            logical = concatenate_columns(parts)
        except ValueError as error:
            raise CheckpointError(f"layer {target.module}: {error}") from error
        stored = self.imported.layers[target.module].spec
        if logical.spec() != stored:
            raise CheckpointError(f"layer {target.module} is {logical.spec().describe()}, announced as {stored.describe()}")
        return logical.store() | self._bias(target, logical.bias)

    def _bias(self, target: Target, bias: Tensor | None) -> dict[str, Tensor]:
        info = self.imported.infos.get(f"{target.module}.bias")
        if info is not None and bias is not None:
            return {"bias": bias.to(info.dtype)}
        if bias is not None and bias.any():
            raise CheckpointError(f"the checkpoint has a bias for {target.module}, which in the model has none")
        return {}

    def copied(self, copy: Copied) -> Tensor:
        """A tensor that is not quantized, in the model's shape."""
        tensor = self.source.get(copy.source)
        return (tensor if copy.rows is None else tensor[copy.rows.picked()]).reshape(copy.shape)

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor to write, one layer in memory at a time."""
        for target in self.imported.plan.targets:
            for leaf, tensor in self.layer(target).items():
                yield f"{target.module}.{leaf}", tensor
        for copy in self.imported.plan.copies:
            yield copy.name, self.copied(copy)


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model that a config describes, without memory for its weights.

    Raises:
        CheckpointError: the config names no class of diffusers, or the class cannot be made from it.
    """
    import diffusers  # imported late, as it takes seconds

    name = str(config.get("_class_name"))
    known = getattr(diffusers, diffusers_class(name), None)
    if known is None:
        raise CheckpointError(f"the config's _class_name is {name!r}, which is no model class of diffusers {version('diffusers')}")
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with init_empty_weights():
            model: nn.Module = known.from_config(kept)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a {name} cannot be made from the config: {error}") from error
    return model


def diffusers_class(name: str) -> str:
    """Nunchaku's name of a model class without its prefix and in diffusers' spelling."""
    return name.removeprefix("Nunchaku").removesuffix("V2").replace("Transformer2dModel", "Transformer2DModel")


def described(config: QDiffConfig, model: nn.Module, layers: dict[str, StoredLayer], origin: str) -> Quantization:
    """The record of a model whose ``layers`` were imported; ``config`` describes approximately how they were quantized."""
    weighted = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
    skipped = {name: "not quantized in the source" for name in weighted if name not in layers}
    return Quantization(config, layers, skipped, new_provenance(type(model).__name__) | {"converted_from": origin})
