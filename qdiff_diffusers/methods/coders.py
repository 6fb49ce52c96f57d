"""Codes of each stored format, chosen column by column for :mod:`error_feedback`."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from qdiff_kernels import pack_bits, unpack_bits
from qdiff_kernels.minifloat import scale_values
from torch import Tensor

from ..formats import CodebookFormat, IntegerFormat, MinifloatFormat, WeightFormat, codebook_table, group_columns
from .additive import decode, encode_under
from .columns import BLOCK, LONGEST_REFIT, RowCodes, descend, make_levels, pass_on, storable
from .compiled import loops
from .error_feedback import Moments, row_blocks
from .nearest import NeighbourLists
from .threads import map_blocks
from .vectors import integer_codebooks, stored_scales, table_neighbours

NEIGHBOURS_FROM = 1024  # entries of a codebook in which descent looks near the present codes only
CODEBOOK_ROWS = 768  # that go through the vectors together: each vector's metric is applied to its codebooks for them


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

    def pass_on(self, weight: Tensor, moments: Moments) -> Tensor:
        return self._in_rows(weight, lambda coder, part: coder._pass_on(weight[part].T, moments))

    def descend(self, weight: Tensor, hessian: Tensor, slopes: Tensor | None = None) -> Tensor:
        """One sweep, see :meth:`Coder.descend`.

        Args:
            slopes: ``(weight - values) @ hessian``, where that is known; it is brought up to date.
        """

        def work(coder: CodebookCoder, part: slice) -> Tensor:
            known = (weight[part] - coder.values) @ hessian if slopes is None else slopes[part]
            gains, slope = coder._descend(known.T.contiguous(), hessian)
            if slopes is not None:
                slopes[part] = slope.T
            return gains

        return self._in_rows(weight, work)

    def _in_rows(self, weight: Tensor, work: Callable[[CodebookCoder, slice], Tensor]) -> Tensor:
        """Let ``work`` change the codes of some rows at a time, through a coder of those rows."""

        def change(part: slice) -> Tensor:
            coder = copy(self)
            coder.codes, coder.values = self.codes[part], self.values[part]
            coder.scales = self.scales[part] if len(self.scales) == len(self.codes) else self.scales
            return work(coder, part)

        return torch.cat(map_blocks(change, weight, row_blocks(weight, CODEBOOK_ROWS)))

    def _pass_on(self, exact: Tensor, moments: Moments) -> Tensor:
        """``exact [columns, rows]``; what is chosen together lies together."""
        wanted, feedback = exact[moments.order], moments.feedback
        values, errors, left = torch.empty_like(wanted), torch.empty_like(wanted), torch.zeros_like(wanted[0])
        for chunk in self._chunks(moments.order):
            start, stop = chunk[0][0].start, chunk[-1][0].stop
            carried = feedback[:start, start:stop].T @ errors[:start]
            for place, columns in chunk:
                unit, local = feedback[place, place], slice(place.start - start, place.stop - start)
                pull = unit * moments.pivots[place]
                slope = pull @ torch.addmm(carried[local], unit.T, wanted[place])
                values[place] = self._choose(columns, slope, pull @ unit.T, self.beam)
                errors[place] = wanted[place] - values[place]
                left += torch.addmm(carried[local], unit.T, errors[place]).square_().mul_(moments.pivots[place, None]).sum(0)
                carried[local.stop :].addmm_(feedback[place, place.stop : stop].T, errors[place])
        self.values[:, moments.order] = values.T
        return left

    def _descend(self, slopes: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """From the error's slopes ``[columns, rows]`` to what each row gains, and the slopes that are left in their place."""
        values, gains = self.values.T.contiguous(), torch.zeros_like(slopes[0])
        for chunk in self._chunks(torch.arange(self.columns, device=slopes.device)):
            part = slice(chunk[0][1].start, chunk[-1][1].stop)
            slope, before = slopes[part].clone(), values[part].clone()
            for _, columns in chunk:
                metric, local = hessian[columns, columns], slice(columns.start - part.start, columns.stop - part.start)
                old = values[columns]
                wanted = torch.addmm(slope[local], metric, old)
                change = self._choose(columns, wanted, metric, max(1, self.beam // 4), old) - old
                gains += torch.addmm(slope[local], metric, change, beta=2, alpha=-1).mul_(change).sum(0)
                values[columns] += change
                slope[local.stop :].addmm_(hessian[columns.stop : part.stop, columns], change, alpha=-1)
            slopes.addmm_(hessian[:, part], values[part] - before, alpha=-1)
        self.values.copy_(values.T)
        return gains, slopes

    def _chunks(self, order: Tensor) -> list[list[tuple[slice, slice]]]:
        """Vectors in the order of their columns, as slices of that order and of the columns, in chunks of about BLOCK columns."""
        chunks: list[list[tuple[slice, slice]]] = []
        place = 0
        starts = order.tolist()
        while place < len(starts):
            column = starts[place]
            width = min(self.step, self.columns - column)
            if not chunks or place + width - chunks[-1][0][0].start > max(BLOCK, self.step):
                chunks.append([])
            chunks[-1].append((slice(place, place + width), slice(column, column + width)))
            place += width
        return chunks

    def _choose(self, columns: slice, slopes: Tensor, metric: Tensor, beam: int, old: Tensor | None = None) -> Tensor:
        """Choose codes of values v that nearly minimise ``v B v^T / 2 - <g, v>`` in each row.

        Args:
            columns: of a vector, or of what there is of the last one.
            slopes: ``[n, rows]``, g.
            metric: ``[n, n]``, B.
            beam: width of the search.
            old: values ``[n, rows]`` of the present codes, which stay unless others are better.

        Returns:
            the values of the codes, ``[n, rows]``.
        """
        vector, scale = columns.start // self.step, self.scale(columns)[:, 0]
        books = self.codebooks[:, :, : len(slopes)].contiguous()
        points = (slopes / torch.where(scale == 0, 1, scale)).T.contiguous()
        near = None if old is None else self._neighbours(points)
        if near is not None and near.suit(metric):
            codes = near.improve_under(points, metric, self.codes[:, vector, 0])[:, None]
        else:
            codes = encode_under(points, books, metric, beam)
        values = decode(codes, books).T * scale
        if old is not None:
            change = values - old
            better = torch.addmm(slopes, metric, values + old, beta=2, alpha=-1).mul_(change).sum(0) > 0
            codes = torch.where(better[:, None], codes, self.codes[:, vector])
            values = torch.where(better, values, old)
        self.codes[:, vector] = codes
        return values

    def _neighbours(self, points: Tensor) -> NeighbourLists | None:
        """Where to look near the present codes, if that is worth it: in one large codebook, known beforehand, by compiled loops."""
        large = self.format.table is not None and len(self.codebooks) == 1 and self.codebooks.shape[1] >= NEIGHBOURS_FROM
        return table_neighbours(str(self.format.table)) if large and loops("search_numba", points) is not None else None

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
        return values.flatten(1)[:, : self.columns] * self.spread()

    def spread(self) -> Tensor:
        """Scales of all columns: ``[rows or 1, columns]``."""
        group = min(group_columns(self.format.group_size, self.columns), self.columns)
        return self.scales.repeat_interleave(group, 1)[:, : self.columns]

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
        self.table = make_levels(self.levels)
        self.codes = unpack_bits(tensors["codes"], fmt.bits, columns)
        self._values: Tensor | None = None
        self._read_scales()

    def pass_on(self, weight: Tensor, moments: Moments) -> Tensor:
        return self._in_rows(weight, lambda exact, codes: pass_on(exact, moments, codes))

    def descend(self, weight: Tensor, hessian: Tensor) -> Tensor:
        def work(exact: Tensor, codes: RowCodes) -> Tensor:
            return descend(exact, hessian, codes)

        return self._in_rows(weight, work, present=True)

    def fit(self, weight: Tensor, moments: Moments, sweeps: int, tolerance: float) -> Tensor:
        """One pass, then sweeps of descent until one lowers the error of a few hundred rows by less than ``tolerance``.

        Returns:
            the error of each row after the pass and after each sweep, float32 ``[sweeps + 1, rows]``.
        """

        def work(exact: Tensor, codes: RowCodes) -> Tensor:
            left = [pass_on(exact, moments, codes)]
            for _ in range(sweeps):
                left.append(left[-1] - descend(exact, moments.matrix, codes))
                if float(left[-1].sum()) > (1 - tolerance) * float(left[-2].sum()):
                    break
            return torch.stack(left + left[-1:] * (sweeps + 1 - len(left)), 1)

        return self._in_rows(weight, work).T

    def _in_rows(self, weight: Tensor, work: Callable[[Tensor, RowCodes], Tensor], present: bool = False) -> Tensor:
        """Let ``work`` choose the codes of some rows at a time, given what they stand for, transposed.

        Args:
            present: whether it begins with the present codes.
        """
        order, codes = self.order.flatten().to(self.codes.dtype), torch.empty_like(self.codes)
        scales, zeros = self.scales.clone(), self.zeros.clone()

        def choose(part: slice) -> Tensor:
            found = self._rows(part, present)
            result = work(weight[part].T.contiguous(), found)
            codes[part] = order[found.ranks.int()].T
            if found.refit:
                scales[part], zeros[part] = found.scales.T, found.zeros.T
            return result

        results = map_blocks(choose, weight, row_blocks(weight))
        self.codes = codes
        self._store(scales, zeros)
        return torch.cat(results)

    def _rows(self, part: slice, present: bool) -> RowCodes:
        """Scales of some rows, and their ``present`` codes."""
        codes = self.codes[part]
        own = self.scales.shape[0] == len(self.codes)
        scales, zeros, second = (t[part] if own else t.expand(len(codes), -1) for t in (self.scales, self.zeros, self.second))
        group = group_columns(self.format.group_size, self.columns)
        groups = torch.arange(self.columns, device=codes.device) // group
        bases = (second.int() * self.levels.shape[1]).T.contiguous()
        unit = self.tensors.get("tensor_scale", torch.ones(1, dtype=torch.float32, device=codes.device)).view(-1)
        found = RowCodes(
            levels=self.table,
            steps=storable(self.tensors["scales"].dtype).to(codes.device),
            groups=groups,
            scales=scales.T.contiguous(),
            zeros=zeros.T.contiguous(),
            units=(unit[part] if len(unit) > 1 else unit.expand(len(codes))).contiguous(),
            bases=bases,
            ranks=torch.empty(self.columns, len(codes), dtype=torch.int16, device=codes.device),
            values=torch.empty(self.columns, len(codes), dtype=torch.float32, device=codes.device),
            refit=(1 + ("zeros" in self.tensors)) if own and min(group, self.columns) <= LONGEST_REFIT else 0,
        )
        if present:
            first = bases[groups]
            found.ranks.copy_(self.order.argsort(1).flatten()[codes.T.long() + first] + first)
            found.values.copy_(self.values[part].T)
        return found

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

    @property
    def values(self) -> Tensor:
        """What the present codes stand for, float32 ``[rows, columns]``."""
        if self._values is None:
            self._values = self.format.dequantize(self.pack(), self.columns)
        return self._values

    def _read_scales(self) -> None:
        scales = scale_values(self.tensors["scales"], torch.float32)
        self.second = scales < 0 if len(self.levels) > 1 else torch.zeros_like(scales, dtype=torch.bool)
        self.scales = scales.abs() if len(self.levels) > 1 else scales
        if "tensor_scale" in self.tensors:
            self.scales = self.scales * self.tensors["tensor_scale"]
        self.zeros = self.tensors["zeros"].float() if "zeros" in self.tensors else torch.zeros_like(self.scales)
        self._values = None

    def _store(self, scales: Tensor, zeros: Tensor) -> None:
        """Go on with other scales and zeros, which the format's dtype holds."""
        if "tensor_scale" in self.tensors:
            scales = scales / self.tensors["tensor_scale"]
        if len(self.levels) > 1:
            scales = torch.where(self.second, -scales, scales)
        dtype = self.tensors["scales"].dtype
        bytes_of_powers = dtype == torch.int8
        changed = {"scales": (scales.log2() + 127).round().to(torch.uint8).view(dtype) if bytes_of_powers else scales.to(dtype)}
        if "zeros" in self.tensors:
            changed["zeros"] = zeros.to(dtype)
        self.tensors = self.tensors | changed
        self._read_scales()


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return scales.clamp(-limit, limit).to(dtype)


def make_coder(fmt: WeightFormat, tensors: dict[str, Tensor], columns: int, beam: int) -> CodebookCoder | ScalarCoder:
    """The coder of a format, beginning with the codes of ``tensors``."""
    if isinstance(fmt, CodebookFormat):
        return CodebookCoder(fmt, tensors, columns, beam)
    assert isinstance(fmt, IntegerFormat | MinifloatFormat)
    return ScalarCoder(fmt, tensors, columns)
