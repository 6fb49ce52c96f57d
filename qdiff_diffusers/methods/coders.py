"""Codes of each stored format, chosen column by column for :mod:`output_error`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from qdiff_kernels import pack_bits, unpack_bits
from qdiff_kernels.minifloat import scale_values
from torch import Tensor

from ..formats import CodebookFormat, IntegerFormat, MinifloatFormat, WeightFormat, codebook_table, group_columns
from .additive import decode, encode
from .vectors import integer_codebooks, stored_scales


class CodebookCoder:
    """Codes of a matrix in a codebook format, vector by vector.

    Args:
        fmt: the format.
        tensors: its tensors, codes to begin with among them.
        columns: of the matrix.
        beam: width of the search.
    """

    def __init__(self, fmt: CodebookFormat, tensors: dict[str, Tensor], columns: int, beam: int) -> None:
        self.format = fmt
        self.columns = columns
        self.step = fmt.vector_size
        self.beam = beam
        table = codebook_table(fmt.table) if fmt.table is not None else tensors["codebooks"]
        self.codebooks = table.to(tensors["codes"].device).float()
        self.stored = None if fmt.table is not None else tensors["codebooks"]
        self.scales = tensors["scales"].float()
        vectors = -(-columns // self.step)
        codes = unpack_bits(tensors["codes"], fmt.codebook_bits, vectors * fmt.num_codebooks)
        self.codes = codes.long().view(len(codes), vectors, fmt.num_codebooks)
        self.decode_all()

    def choose(self, columns: slice, targets: Tensor, factor: Tensor) -> Tensor:
        scale = self.scale(columns)
        width = targets.shape[1]
        books = self.codebooks[:, :, :width]
        safe = torch.where(scale == 0, 1, scale)
        self.proposed = encode((targets / safe) @ factor, (books @ factor).contiguous(), self.beam)
        return decode(self.proposed, books.contiguous()) * scale

    def accept(self, columns: slice, rows: Tensor) -> None:
        vector = columns.start // self.step
        self.codes[:, vector] = torch.where(rows[:, None], self.proposed, self.codes[:, vector])
        width = columns.stop - columns.start
        values = decode(self.codes[:, vector], self.codebooks[:, :, :width].contiguous())
        self.values[:, columns] = values * self.scale(columns)

    can_rescale = True

    def rescale(self, factors: Tensor) -> None:
        """Multiply the scales of each row by ``factors [rows]``, or a scale for all rows by their mean."""
        factors = factors[:, None] if len(self.scales) == len(factors) else factors.mean().view(1, 1)
        self.scales = stored_scales(self.scales * factors, self.format)
        self.decode_all()

    def pack(self) -> dict[str, Tensor]:
        """The format's tensors."""
        return self.format.pack(self.codes, self.stored, self.scales)

    def values_of(self, codebooks: Tensor) -> Tensor:
        """What the present codes stand for with other codebooks ``[M, k, d]``: ``[rows, columns]``, differentiable."""
        values = sum(F.embedding(self.codes[..., m], book) for m, book in enumerate(codebooks))
        assert isinstance(values, Tensor)
        spread = self.scales.repeat_interleave(group_columns(self.format.group_size, self.columns), 1)
        return values.flatten(1)[:, : self.columns] * spread[:, : self.columns]

    def refresh(self, rows: Tensor, vectors: Tensor) -> None:
        """Bring ``values`` up to date with the codes at ``(rows[i], vectors[i])``."""
        for v in vectors.unique().tolist():
            columns = slice(v * self.step, min((v + 1) * self.step, self.columns))
            chosen = rows[vectors == v]
            scale = self.scale(columns)
            books = self.codebooks[:, :, : columns.stop - columns.start].contiguous()
            self.values[chosen, columns] = decode(self.codes[chosen, v], books) * (scale[chosen] if len(scale) > 1 else scale)

    def replace_codebooks(self, codebooks: Tensor) -> None:
        """Go on with other codebooks ``[M, k, d]``, rounded to the stored dtype."""
        if self.format.codebook_dtype == "int8":
            self.stored, step = integer_codebooks(codebooks)
            self.codebooks = self.stored.float()
            self.scales = stored_scales(self.scales * step, self.format)
        else:
            self.stored = codebooks.to(torch.float16)
            self.codebooks = self.stored.float()
        self.decode_all()

    def decode_all(self) -> None:
        """Bring ``values`` up to date."""
        self.values = self.values_of(self.codebooks)

    def scale(self, columns: slice) -> Tensor:
        group = columns.start // group_columns(self.format.group_size, self.columns)
        return self.scales[:, group : group + 1]


class ScalarCoder:
    """Codes of a matrix in an integer or minifloat format, column by column; scales stay as they are but for :meth:`rescale`.

    Args:
        fmt: the format.
        tensors: its tensors.
        columns: of the matrix.
    """

    step = 1

    def __init__(self, fmt: IntegerFormat | MinifloatFormat, tensors: dict[str, Tensor], columns: int) -> None:
        self.format = fmt
        self.columns = columns
        self.tensors = tensors
        device = tensors["codes"].device
        if isinstance(fmt, IntegerFormat):
            offset = 1 << (fmt.bits - 1) if fmt.symmetric else 0
            levels = torch.arange(1 << fmt.bits, device=device).float()[None] - offset
        else:
            levels = torch.tensor(fmt.levels(), dtype=torch.float32, device=device)
        self.levels, self.order = levels.sort(1)
        self.edges = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
        self.codes = unpack_bits(tensors["codes"], fmt.bits, columns)
        self._read_scales()

    def choose(self, columns: slice, targets: Tensor, factor: Tensor) -> Tensor:
        scale, zero, second = self._group(columns.start)
        wanted = (targets[:, 0] - zero) / torch.where(scale == 0, 1, scale)
        rank = torch.bucketize(wanted, self.edges[0])
        found, values = self.order[0][rank], self.levels[0][rank]
        if len(self.levels) > 1:
            rank = torch.bucketize(wanted, self.edges[1])
            found, values = torch.where(second, self.order[1][rank], found), torch.where(second, self.levels[1][rank], values)
        self.proposed = found.to(self.codes.dtype)
        return (values * scale + zero)[:, None]

    def accept(self, columns: slice, rows: Tensor) -> None:
        column = columns.start
        scale, zero, second = self._group(column)
        codes = torch.where(rows, self.proposed, self.codes[:, column])
        self.codes[:, column] = codes
        self.values[:, column] = self._look_up(codes, second) * scale + zero

    def rescale(self, factors: Tensor) -> None:
        """Multiply the scales of each row by ``factors [rows]``, where scales are fine enough for that."""
        if not self.can_rescale:
            return
        for name in ("scales", "zeros"):
            if name in self.tensors:
                old = self.tensors[name]
                change = factors[:, None] if len(old) == len(factors) else factors.mean().view(1, 1)
                self.tensors = self.tensors | {name: stored(old.float() * change, old.dtype)}
        self._read_scales()

    def neighbours(self, dense: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scales and zeros of every weight of ``dense [rows, columns]``, and the ranks of the levels just below and above it."""
        group = torch.arange(self.columns, device=dense.device) // group_columns(self.format.group_size, self.columns)
        scale, zero, second = (t.expand(len(dense), -1)[:, group] for t in (self.scales, self.zeros, self.second))
        wanted = (dense - zero) / torch.where(scale == 0, 1, scale)
        ranks = torch.searchsorted(self.levels[0], wanted.contiguous(), right=True)
        if len(self.levels) > 1:
            ranks = torch.where(second, torch.searchsorted(self.levels[1], wanted.contiguous(), right=True), ranks)
        count = self.levels.shape[1]
        below = (ranks - 1).clamp(0, count - 1)
        above = ranks.clamp(0, count - 1)
        offset = second.long() * count  # ranks of the second encoding follow those of the first
        return scale, zero, below + offset, above + offset

    def levels_of(self, ranks: Tensor) -> Tensor:
        """Levels at ``ranks`` as :meth:`neighbours` counts them."""
        return self.levels.flatten()[ranks]

    def take(self, ranks: Tensor) -> None:
        """Make the codes those of the levels at ``ranks [rows, columns]``."""
        self.codes = self.order.flatten()[ranks].to(self.codes.dtype)
        self._read_scales()

    @property
    def can_rescale(self) -> bool:
        """Whether scales are fine enough to be adjusted by less than their own steps."""
        return self.tensors["scales"].dtype in (torch.float16, torch.bfloat16, torch.float32)

    def pack(self) -> dict[str, Tensor]:
        """The format's tensors."""
        return self.tensors | {"codes": pack_bits(self.codes, self.format.bits)}

    def _read_scales(self) -> None:
        scales = scale_values(self.tensors["scales"], torch.float32)
        self.second = scales < 0 if len(self.levels) > 1 else torch.zeros_like(scales, dtype=torch.bool)
        self.scales = scales.abs() if len(self.levels) > 1 else scales
        if "tensor_scale" in self.tensors:
            self.scales = self.scales * self.tensors["tensor_scale"]
        self.zeros = self.tensors["zeros"].float() if "zeros" in self.tensors else torch.zeros_like(self.scales)
        self.values = self.format.dequantize(self.pack(), self.columns)

    def _look_up(self, codes: Tensor, second: Tensor) -> Tensor:
        tables = torch.zeros_like(self.levels).scatter_(1, self.order, self.levels)  # back in the order of codes
        values = tables[0][codes.long()]
        return torch.where(second, tables[1][codes.long()], values) if len(tables) > 1 else values

    def _group(self, column: int) -> tuple[Tensor, Tensor, Tensor]:
        group = column // group_columns(self.format.group_size, self.columns)
        return self.scales[:, group], self.zeros[:, group], self.second[:, group]


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return scales.clamp(-limit, limit).to(dtype)


def make_coder(fmt: WeightFormat, tensors: dict[str, Tensor], columns: int, beam: int) -> CodebookCoder | ScalarCoder:
    """The coder of a format, beginning with the codes of ``tensors``."""
    if isinstance(fmt, CodebookFormat):
        return CodebookCoder(fmt, tensors, columns, beam)
    assert isinstance(fmt, IntegerFormat | MinifloatFormat)
    return ScalarCoder(fmt, tensors, columns)
