"""From a dense weight and a config to packed tensors and their spec: the one way into the methods."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from qdiff_kernels import largest_block, matrix_layout
from torch import Tensor

from ..errors import QDiffError
from ..formats import LayerSpec, WeightFormat, matrix_shape, rotate_matrix, unrotate_matrix
from ..formats.regular import regular_block, regular_signs
from ..formats.transform import kernels_first, smooth_matrix
from .base import method_of
from .calibrated import fit_to_inputs, keep_gain
from .config import REGULAR, QDiffConfig
from .error_feedback import damped
from .inputs import NOISE_SHARE, Samples, fit_inputs, for_noisy_inputs, input_noise
from .magnitude import even_exponent, half_precision, reach, restore, row_exponents, times_power
from .smoothing import search_smoothing
from .threads import map_blocks
from .unbias import sample_rows, unbias

ORDINARY_MOMENTS = 20  # exponent of second moments within which they are left as they are
MIN_ROTATION = 16  # a smaller Hadamard block mixes too few weights to be worth a pass over the activations


class QuantizedWeight(NamedTuple):
    """``tensors`` are those of ``spec.tensors(shape)``; ``error`` is ``|W - W'|^2 / |W|^2``, on a sample of rows if large."""

    spec: LayerSpec
    tensors: dict[str, Tensor]
    error: float


class LayerInputs(NamedTuple):
    """What is known of a layer's inputs x.

    Attributes:
        hessian: float32 ``[columns, columns]``, mean of ``x x^T``, columns as in the stored matrix; ``None`` to choose codes by the
            weight alone.
        damping: of the Hessian, relative to its mean diagonal.
        errors: takes the relative error of the layer's output without data, and after each round with them.
        samples: float32 ``[n, columns]`` of x by timestep, for what depends on more than second moments.
        shiftable: whether the layer has a bias that can undo a shift of its inputs, and pads them with no zeros.
        noise_share: how far codes make up for the noise that 4-bit activations add to the samples, 0 to 1.
    """

    hessian: Tensor | None
    damping: float = 0.01
    errors: list[float] | None = None
    samples: Samples | None = None
    shiftable: bool = False
    noise_share: float = NOISE_SHARE


def quantize_weight(weight: Tensor, config: QDiffConfig, seed: int = 0, inputs: LayerInputs | None = None) -> QuantizedWeight:
    """Quantize one weight, by itself or for inputs that are known.

    All is computed in float32: tensors are made with a dtype, whatever the process, or another thread, has made its default.

    Args:
        weight: floating ``[out, in]`` or ``[out, in, kh, kw]``, on any device.
        config: method and settings; its ``overrides`` are not looked at.
        seed: of everything random.
        inputs: of the layer; codes then minimise the error of its output rather than that of its weight.

    Raises:
        QDiffError: the weight holds NaN or infinity.
    """
    shape, method = tuple(weight.shape), method_of(config)
    matrix = _matrix(weight.detach())
    channels, block = shape[1], rotation_block(shape[1], config)
    by_kernels = method.kernel_vectors(config, shape)
    given = getattr(config, "tensor_scale", None) is not None  # which fits weights of any size
    exact = matrix
    exponents = None if given else row_exponents(matrix, reach(method.formats(config, matrix_shape(shape))))
    if exponents is not None:
        matrix = times_power(matrix, -exponents)
    smooth = _smoothing(matrix, config, seed, inputs, channels, block)
    working = rotate_matrix(matrix if smooth is None else smooth_matrix(matrix, smooth), channels, block)
    if by_kernels:
        working = kernels_first(working, channels)
    choose = method.quantize if inputs is None or inputs.hessian is None else method.draft
    weight_format, tensors = choose(working, config, seed)
    if inputs is not None and inputs.hessian is not None:
        seen = rotate_hessian(smooth_hessian(inputs.hessian.to(working), smooth), channels, block)
        noise = input_noise(inputs.samples, config, channels, share=inputs.noise_share, smooth=smooth, rotation=block)
        if by_kernels:
            seen = kernels_first(kernels_first(seen, channels).T.contiguous(), channels)
            noise = None if noise is None else kernels_first(noise[None], channels)[0]
        tensors |= _fit(working, weight_format, tensors, inputs._replace(hessian=seen), noise, config.unbiased)
    elif config.unbiased:
        tensors = unbias(working, weight_format, tensors)
    if "low_rank_down" in tensors:  # found in the rotated and smoothed space, used on the raw input
        down = unrotate_matrix(tensors["low_rank_down"].float(), channels, block)
        down = down if smooth is None else smooth_matrix(down, 1 / smooth)
        tensors["low_rank_down"] = half_precision(down, anywhere=exponents is not None)
    if smooth is not None:
        tensors["smooth"] = smooth.to(torch.float16)
    if config.needs_samples and inputs is not None and inputs.samples:
        fitted = fit_inputs(inputs.samples, config, channels, smooth=smooth, rotation=block, shiftable=inputs.shiftable)
        tensors |= {name: t.half() if name == "shift" else t for name, t in fitted.items()}
    spec = LayerSpec(
        weight_format,
        rank=tensors["low_rank_down"].shape[0] if "low_rank_down" in tensors else 0,
        rotation=block,
        smooth=smooth is not None,
        activations=config.activations or "none",
        shift="shift" in tensors,
        kernel_vectors=by_kernels,
        input_scales=len(tensors.get("input_scales", ())),
    )
    if exponents is not None:
        spec, tensors = restore(spec, tensors, exponents)
    # With the strides and the memory of a tensor read from a file: BLAS rounds [1, n] of stride (1, 1) and of (n, 1) differently.
    tensors = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in spec.tensors(shape)}
    error = relative_error(exact, spec, tensors, shape)
    if not math.isfinite(error):
        raise QDiffError(f"weights of up to {float(exact.abs().max()):.3g} are too large for float32 once they are quantized")
    return QuantizedWeight(spec, tensors, error)


def _matrix(weight: Tensor) -> Tensor:
    """The matrix of a weight, float32 ``[rows, columns]``.

    Raises:
        QDiffError: the weight holds NaN or infinity.
    """
    source = matrix_layout(weight)
    as_it_is = source.dtype == torch.float32 and source.is_contiguous()
    matrix = source if as_it_is else torch.empty(source.shape, dtype=torch.float32, device=source.device)

    def is_finite(part: slice) -> bool:
        rows = matrix[part] if as_it_is else matrix[part].copy_(source[part])
        return bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all())

    if not all(map_blocks(is_finite, matrix)):
        raise QDiffError("the weight holds NaN or infinity")
    return matrix


def _smoothing(
    matrix: Tensor, config: QDiffConfig, seed: int, inputs: LayerInputs | None, channels: int, block: int
) -> Tensor | None:
    """The vector that inputs are divided by: signs that make the rotation regular, or where a config asks for one and there are
    inputs to find it on, that one."""
    if config.rotation == REGULAR:
        return regular_signs(channels, block).to(matrix) if block else None
    quantize = method_of(config).smoother(config, seed)
    if quantize is None or inputs is None or not inputs.samples:
        return None
    rows = torch.cat(list(inputs.samples.values())).to(matrix)
    activations = config.activations or "none"
    return search_smoothing(matrix, rows, channels, block, activations, quantize)


@torch.no_grad()
def format_target(weight: Tensor, spec: LayerSpec, tensors: dict[str, Tensor]) -> Tensor:
    """What the format of a packed layer stands for: the dense ``weight`` less the low-rank branch, smoothed and rotated.

    Returns:
        float32 ``[rows, columns]``.
    """
    shape = tuple(weight.shape)
    matrix = matrix_layout(weight.detach()).float()
    if spec.rank:
        matrix = matrix - (tensors["low_rank_up"].float() @ tensors["low_rank_down"].float()).to(matrix)
    if spec.smooth:
        matrix = smooth_matrix(matrix, tensors["smooth"].to(matrix))
    matrix = rotate_matrix(matrix, shape[1], spec.rotation)
    return (kernels_first(matrix, shape[1]) if spec.kernel_vectors else matrix).contiguous()


def rotate_hessian(hessian: Tensor, channels: int, block: int) -> Tensor:
    """Second moments of the rotated inputs."""
    half = rotate_matrix(hessian, channels, block)
    return rotate_matrix(half.T.contiguous(), channels, block)


def smooth_hessian(hessian: Tensor, smooth: Tensor | None) -> Tensor:
    """Second moments of inputs that were divided by ``smooth [channels]``."""
    if smooth is None:
        return hessian
    return smooth_matrix(smooth_matrix(hessian, 1 / smooth).T.contiguous(), 1 / smooth)


def _fit(
    matrix: Tensor,
    weight_format: WeightFormat,
    tensors: dict[str, Tensor],
    inputs: LayerInputs,
    noise: Tensor | None,
    unbiased: bool,
) -> dict[str, Tensor]:
    """The format's tensors, fitted to what a low-rank branch leaves of ``matrix``."""
    if "low_rank_down" in tensors:
        matrix = matrix - tensors["low_rank_up"].float() @ tensors["low_rank_down"].float()
    own = {name: tensors[name] for name in weight_format.tensors(*matrix.shape)}
    assert inputs.hessian is not None
    hessian, noise = _near_one(inputs.hessian, noise)
    hessian = damped(hessian, inputs.damping)
    target, seen = (matrix, hessian) if noise is None else for_noisy_inputs(matrix, hessian, noise.to(hessian))
    found = fit_to_inputs(target, weight_format, own, seen, errors=inputs.errors)
    return keep_gain(matrix, weight_format, found, hessian) if unbiased else found


def _near_one(hessian: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Second moments of inputs and of their noise, both over the power of two that brings inputs of unusual size near 1."""
    exponent = even_exponent(float(hessian.diagonal().mean()))
    if abs(exponent) <= ORDINARY_MOMENTS:
        return hessian, noise
    power = torch.tensor(-exponent, device=hessian.device)
    return times_power(hessian, power), None if noise is None else times_power(noise, power)


def rotation_block(channels: int, config: QDiffConfig) -> int:
    """Hadamard block for a layer of ``channels`` inputs; 0 if the config wants none or the width allows none."""
    method = method_of(config)
    inner = method.inner(config)
    rotates = (method if inner is None else method_of(inner)).rotates
    wanted = rotates if config.rotation is None else config.rotation
    block = (regular_block(channels) if wanted == REGULAR else largest_block(channels)) if wanted else 0
    return block if block >= MIN_ROTATION else 0


def relative_error(matrix: Tensor, spec: LayerSpec, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> float:
    """Squared error of the packed weight over the squared norm of ``matrix [rows, columns]``, from evenly spaced rows.

    Not a number where the packed weight is infinite.
    """
    exact, sample = sample_rows(matrix, tensors)
    sampled_shape = (exact.shape[0], *shape[1:])
    packed = matrix_layout(spec.dequantize(sample, sampled_shape))
    exponent = torch.tensor(-even_exponent(float(exact.abs().max())), device=matrix.device)
    packed, exact = times_power(packed, exponent), times_power(exact, exponent)  # squares stay finite
    return float((packed - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
