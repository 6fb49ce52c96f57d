"""Dense bit packing of small unsigned codes.

Code ``i`` of a row occupies bits ``i*bits .. i*bits + bits - 1`` of that row's byte string, least significant bit first. Each row
starts on a byte, so rows can be sliced and concatenated without unpacking. Bytes are stored as ``int8`` (diffusers casts
timesteps to a model's first parameter dtype unless that is ``int8``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BITS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: integer ``[..., count]``, values in ``0 .. 2**bits - 1``.
        bits: 1 to 16.

    Returns:
        int8 ``[..., packed_bytes(count, bits)]``.
    """
    _check_bits(bits)
    count = codes.shape[-1]
    if count and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in 0..{(1 << bits) - 1}, got {int(codes.min())}..{int(codes.max())}")
    if bits == 8 or not count:
        return codes.to(torch.uint8).view(torch.int8)
    if bits < 8 and count:
        return _pack_pairwise(codes, bits)[..., : packed_bytes(count, bits)].contiguous()
    padded = F.pad(codes.to(torch.int32), (0, -count % 8)).unflatten(-1, (-1, 8))
    out = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = padded[..., position] << shift
        while value is not None:
            out[..., byte] |= value & 0xFF
            byte, remaining = byte + 1, byte * 8 + 8 < (position + 1) * bits
            value = value >> 8 if remaining else None
    packed = out.to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)]
    return packed.contiguous().view(torch.int8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: int8 ``[..., packed_bytes(count, bits)]``.

    Returns:
        int32 ``[..., count]``.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {packed.shape[-1]}")
    if not packed.numel():
        return packed.new_empty(*packed.shape[:-1], count, dtype=torch.int32)
    if bits < 8 and count:
        return _unpack_pairwise(packed, bits)[..., :count].to(torch.int32)
    data = packed.contiguous().view(torch.uint8).to(torch.int32)
    if bits == 8:
        return data
    data = F.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))
    out = torch.empty(*data.shape[:-1], 8, dtype=torch.int32, device=packed.device)
    for position in range(8):
        first, shift = divmod(position * bits, 8)
        last = ((position + 1) * bits - 1) // 8
        value = data[..., first] >> shift
        for byte in range(first + 1, last + 1):
            value = value | (data[..., byte] << ((byte - first) * 8 - shift))
        out[..., position] = value & ((1 << bits) - 1)
    return out.flatten(-2)[..., :count]


# Eight codes of less than 8 bits fill as many bytes as a code has bits. They are merged in pairs, in words that double from 8
# to 64 bits (little-endian, as all of torch's platforms): three passes over few bytes instead of eight over many.
_WORDS = ((torch.int16, 8), (torch.int32, 16), (torch.int64, 32))


def _pack_pairwise(codes: Tensor, bits: int) -> Tensor:
    """int8 ``[..., ceil(count / 8) * bits]``."""
    words = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % 8))
    words = words.contiguous().flatten().view(words.shape)  # a single row of a larger tensor counts as contiguous, with its stride
    held = bits
    for dtype, width in _WORDS:
        pair = words.view(dtype)
        low = (1 << held) - 1
        words = (pair & low) | ((pair >> (width - held)) & (low << held))
        held *= 2
    return words.view(torch.int8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)


def _unpack_pairwise(packed: Tensor, bits: int) -> Tensor:
    """uint8, at least as many codes as the bytes hold."""
    data = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = F.pad(data, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    held = bits * 4
    for (_, width), dtype in zip(reversed(_WORDS), (torch.int32, torch.int16, torch.uint8), strict=True):
        low = (1 << held) - 1
        words = ((words & low) | ((words & (low << held)) << (width - held))).view(dtype)
        held //= 2
    return words


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")
