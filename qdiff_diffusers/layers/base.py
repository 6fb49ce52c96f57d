"""Base of the packed layers: their tensors, the logical weight, and protection from dtype casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from qdiff_kernels import (
    codebook_conv2d,
    codebook_linear,
    integer_conv2d,
    integer_linear,
    minifloat_conv2d,
    minifloat_linear,
)
from torch import Tensor, nn

from ..formats import LayerSpec, TensorInfo, load_shared_codebooks
from ..formats.spec import EXTRAS_DTYPES
from .offloading import fetch, has_hooks

LINEAR_OPS = {"codebook": codebook_linear, "minifloat": minifloat_linear, "integer": integer_linear}
CONV2D_OPS = {"codebook": codebook_conv2d, "minifloat": minifloat_conv2d, "integer": integer_conv2d}
PARAMETERS = ("codes", "weight", "bias")


def op_arguments(
    spec: LayerSpec,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    bias: Tensor | None,
    timestep: Tensor | None = None,
    exact_inputs: bool = False,
) -> tuple[Any, ...]:
    """A packed weight of logical ``shape``, its bias, low-rank branch and input transforms, in the order of the kernels' arguments.

    Args:
        timestep: ``[1]``, chooses among activation scales that depend on the timestep.
        exact_inputs: leave the inputs in 16 bits.
    """
    others = (bias, *(tensors.get(name) for name in ("low_rank_down", "low_rank_up", "smooth")))
    packed = spec.format.op_arguments(tensors, math.prod(shape[1:]))
    kind, scale = ("none", None) if exact_inputs else (spec.activations, input_scale(tensors, timestep))
    return (*packed, *others, spec.rotation, kind, tensors.get("shift"), scale)


def input_scale(tensors: dict[str, Tensor], timestep: Tensor | None) -> Tensor | None:
    """The stored activation scale ``[1]`` of the timestep nearest to ``timestep [1]`` (else the largest), if there are any."""
    if (scales := tensors.get("input_scales")) is None:
        return None
    if (steps := tensors.get("input_steps")) is None or timestep is None:
        return scales.amax().reshape(1)
    return scales[(steps - timestep.to(steps)).abs().argmin().reshape(1)]


def set_tensor(module: nn.Module, name: str, tensor: Tensor, persistent: bool = True) -> None:
    """Make ``tensor`` the parameter or buffer ``name`` of a module: codes and dense weights are parameters, the rest are buffers.

    It avoids ``register_parameter`` and ``register_buffer``, which accelerate and PEFT replace at times for the whole process:
    what any thread registers meanwhile ends on the meta device.
    """
    if name in PARAMETERS:
        module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        return
    module._buffers[name] = tensor
    (module._non_persistent_buffers_set.discard if persistent else module._non_persistent_buffers_set.add)(name)


class PackedLayer(nn.Module):
    """Mixin of the packed layers.

    Codes are int8 parameters, which offloading moves and diffusers' timestep casts ignore; they come after the bias. All
    other tensors are buffers that keep their dtype, so that float32 scales survive ``.to(torch.bfloat16)`` and a float16
    tensor never passes for the model's dtype.
    """

    spec: LayerSpec
    tensor_names: tuple[str, ...]
    compute_dtype: torch.dtype
    dense_class: type[nn.Module]
    bias: nn.Parameter | None
    codes: Tensor
    low_rank_down: Tensor
    low_rank_up: Tensor
    timestep: Tensor | None = None  # [1], the model's latest timestep; see timesteps.py
    exact_inputs: bool = False  # whether inputs are left in 16 bits for now

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Logical shape of the weight."""
        raise NotImplementedError

    @classmethod
    def convert(cls, module: nn.Module, spec: LayerSpec, compute_dtype: torch.dtype, tensors: dict[str, Tensor]) -> Any:
        """Turn an ``nn.Linear`` or ``nn.Conv2d`` into a packed layer in place, keeping its hooks, its bias and its identity."""
        module._parameters.pop("weight", None)
        module.dense_class = type(module)  # type: ignore[assignment]
        module.__class__ = cls
        cast(PackedLayer, module).describe(spec)
        module.compute_dtype = compute_dtype  # type: ignore[assignment]
        for name, tensor in tensors.items():
            set_tensor(module, name, tensor)
        return module

    def describe(self, spec: LayerSpec) -> None:
        """Set ``spec`` and the names of its tensors, which a traced forward pass must not compute."""
        self.spec, self.tensor_names = spec, tuple(spec.tensors(self.weight_shape))
        load_shared_codebooks(spec.format)

    def tensor_infos(self) -> dict[str, TensorInfo]:
        """Name, shape and dtype of the stored tensors."""
        return self.spec.tensors(self.weight_shape)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        parameters, buffers, found = self._parameters, self._buffers, {}
        for name in self.tensor_names:  # each call of a layer comes here, and __getattr__ is slow
            tensor = parameters.get(name, buffers.get(name))
            if tensor is not None or (tensor := getattr(self, name, None)) is not None:
                found[name] = tensor
        return found

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight this layer is equivalent to, in its logical shape; of an offloaded layer too."""
        tensors = self.packed_tensors()
        if has_hooks(self):
            tensors |= {name: tensor for name, tensor in fetch(self).items() if name in tensors}
        return self.spec.dequantize(tensors, self.weight_shape, dtype or self.compute_dtype)

    def dense_bias(self) -> Tensor | None:
        """The bias of the dense layer this layer is equivalent to."""
        if not self.spec.shift:
            return self.bias
        offset = self.spec.shift_offset(self.packed_tensors(), self.weight_shape)
        return (offset if self.bias is None else self.bias.float() + offset).to(self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each access: for code that asks a layer for its shape, dtype or device."""
        return self.dequantize()

    def restore_dense_parts(self) -> None:
        """Restore what the dense class holds besides its weight, before the layer becomes dense again."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, everything but the bias counted."""
        return self.spec.bits_per_weight(self.weight_shape)

    def append_branch(self, down: Tensor, up: Tensor) -> None:
        """Add ``up [rows, rank] @ down [rank, columns]`` to the weight, by lengthening the low-rank branch.

        The branch keeps its dtype if that holds the factors exactly, and becomes float32 if not.
        """
        spec = self.spec
        has_extras = spec.rank or spec.smooth or spec.shift
        choices = (spec.extras_dtype,) if has_extras else ("float16", "bfloat16")
        name = next((name for name in choices if _fits(down, name) and _fits(up, name)), "float32")
        self._cast_extras(name)
        for dim, (key, factor) in enumerate({"low_rank_down": down, "low_rank_up": up}.items()):
            # A copy: training or swapping the adapter must not change what was fused.
            factor = factor.to(self.codes.device, EXTRAS_DTYPES[name], copy=True).contiguous()
            old = getattr(self, key, None)
            set_tensor(self, key, factor if old is None else torch.cat([old, factor], dim))
        self.describe(replace(self.spec, rank=spec.rank + len(down)))

    def drop_branch(self, rank: int, extras_dtype: str) -> None:
        """Undo the last :meth:`append_branch`, which added ``rank`` to a branch of ``extras_dtype``."""
        left = self.spec.rank - rank
        self.describe(replace(self.spec, rank=left))
        if left:
            set_tensor(self, "low_rank_down", self.low_rank_down[:left].clone())
            set_tensor(self, "low_rank_up", self.low_rank_up[:, :left].contiguous())
        else:
            del self.low_rank_down, self.low_rank_up
        self._cast_extras(extras_dtype)

    def _cast_extras(self, name: str) -> None:
        """Store branch, ``smooth`` and ``shift`` in another dtype."""
        for key in ("low_rank_down", "low_rank_up", "smooth", "shift"):
            if (tensor := getattr(self, key, None)) is not None:
                set_tensor(self, key, tensor.to(EXTRAS_DTYPES[name]))
        self.describe(replace(self.spec, extras_dtype=name))

    def check_channels(self, given: int, expected: int) -> None:
        """Refuse inputs with another number of channels, which the kernels cannot always tell from the packed bytes."""
        if given != expected:
            raise ValueError(f"{type(self).__name__} takes {expected} input channels, got {given}")

    def op_arguments(self) -> tuple[Any, ...]:
        """This layer's arguments for its op, in the op's order; see the function of this name."""
        return op_arguments(self.spec, self.packed_tensors(), self.weight_shape, self.bias, self.timestep, self.exact_inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        packed = {id(t) for t in self.packed_tensors().values()}
        dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if dtype.itemsize > 1:  # nothing computes in float8, in which layerwise casting stores a layer between uses
            self.compute_dtype = dtype

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in packed and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_dtype, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling, with float8 tensors as bytes: torch cannot read its own pickles of them."""
        state = self.__dict__.copy()
        eight = {n: t for n, t in self._buffers.items() if t is not None and t.dtype == torch.float8_e4m3fn}
        state["_buffers"] = self._buffers | {name: tensor.view(torch.int8) for name, tensor in eight.items()}
        return state | {"_float8": list(eight)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        float8 = state.pop("_float8")
        super().__setstate__(state)
        load_shared_codebooks(self.spec.format)
        self._buffers.update({name: cast(Tensor, self._buffers[name]).view(torch.float8_e4m3fn) for name in float8})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec.describe()}, {self.bits_per_weight:.2f} bits"


def _fits(tensor: Tensor, name: str) -> bool:
    """Whether a dtype holds a float32 tensor exactly."""
    return torch.equal(tensor.to(EXTRAS_DTYPES[name]).float(), tensor)
