"""The layers of the table: what every method's configs make, at each kind of activations, shape and number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from qdiff_kernels.gpu import ops
from torch import Tensor

from qdiff_diffusers.bench.defaults import Default, default_layers
from qdiff_diffusers.formats import CodebookFormat, LayerSpec
from qdiff_diffusers.layers.base import op_arguments

from .devices import Device
from .record import Vendor

SHAPES = ((3072, 3072), (12288, 3072))  # [out, in]
TOKENS = (1, 16, 256, 1024, 4096)
KINDS = ("none", "int8", "fp8", "int4")


class Case(NamedTuple):
    """One layer, its activations and its input."""

    layer: Default
    activations: str
    shape: tuple[int, int]  # [out, in]
    tokens: int

    @property
    def spec(self) -> LayerSpec:
        return dataclasses.replace(self.layer.spec, activations=self.activations)

    def prepare(self, make: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """The op as the layer calls it, on tensors that ``make`` makes."""
        tensors = {name: make(info.shape, info.dtype) for name, info in self.spec.tensors(self.shape).items()}
        weight_format = self.spec.format
        if isinstance(weight_format, CodebookFormat) and "codebooks" not in tensors:
            books, bits, vector = weight_format.num_codebooks, weight_format.codebook_bits, weight_format.vector_size
            tensors["codebooks"] = make((books, 1 << bits, vector), torch.int8)  # universal ones are not stored with a layer
        arguments = op_arguments(self.spec, tensors, self.shape, make((self.shape[0],), torch.bfloat16))
        x = make((self.tokens, self.shape[1]), torch.bfloat16)
        return lambda: ops.linear(weight_format.kind, x, *arguments)

    @property
    def dense(self) -> Vendor:
        """The same layer in bfloat16."""
        rows, columns = self.shape
        size = 2 * (rows * columns + self.tokens * (rows + columns))
        return Vendor("dense", size, (self.tokens, rows, columns), torch.bfloat16)

    def ideal(self, device: Device) -> float:
        """Seconds of a kernel that does nothing but multiply at the data sheet's rate, or move its bytes at the memory's."""
        rows, columns = self.shape
        kind = {"none": "bits16", "fp8": "fp8"}.get(self.activations, "int8")
        rate = getattr(device.rates, kind) or device.rates.bits16
        compute = self.tokens * rows * columns / (rate * device.multiprocessors * device.clock)
        size = self.spec.nbytes(self.shape) + 2 * self.tokens * (rows + columns)
        return max(compute, size / device.bandwidth)

    def __str__(self) -> str:
        return f"{self.layer.name} {self.activations} {self.shape[0]}x{self.shape[1]} M={self.tokens}"


def cases(
    only: str = "", kinds: tuple[str, ...] = KINDS, tokens: tuple[int, ...] = TOKENS, headlines: bool = False
) -> Iterator[Case]:
    """All layers, or those whose name holds ``only``, or those that methods make unasked (``headlines``)."""
    for layer in default_layers():
        if only not in layer.name or (headlines and not layer.headline):
            continue
        for activations in kinds:
            if activations != "none" and activations not in layer.activations:
                continue
            for shape in SHAPES:
                for count in tokens:
                    yield Case(layer, activations, shape, count)
