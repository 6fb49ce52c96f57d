"""Packed weights as differentiable functions of trainable parameters, codes included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import CodebookFormat, WeightFormat
from ..methods.additive import decode, encode
from ..methods.coders import CodebookCoder, ScalarCoder, make_coder
from ..methods.nearest import nearest_few
from .settings import Tuning

BEAM = 16
STRETCH, LOWEST = 1.2, -0.1  # stretch of AdaRound's rectified sigmoid
SURE = 0.99  # ratio from which on a vector's assignment is settled (VQ4DiT's released code)
SETTLED = 100.0  # logit of a rounding that has settled, out of reach of any momentum
SETTLED_BY = 0.8  # share of the steps by which all have settled; only the codebooks are trained in the rest


class ParameterGroup(NamedTuple):
    """Parameters with their own learning rate: ``kind`` is "continuous" or "codes", and rates are relative to ``size``."""

    parameters: list[nn.Parameter]
    kind: str
    size: float


class TrainableWeight(nn.Module):
    """A packed weight with fixed codes and free scales, the base of the others.

    Scales are multiplied by ``factors``, which begin at 1.
    """

    def __init__(self, coder: CodebookCoder | ScalarCoder) -> None:
        super().__init__()
        self.coder = coder
        ones = torch.ones(len(coder.scales), 1, dtype=torch.float32, device=coder.values.device)
        self.factors = nn.Parameter(ones, requires_grad=coder.can_rescale)

    def forward(self) -> Tensor:
        """The weight float32 ``[rows, columns]``, differentiable."""
        return self.coder.values * self.factors

    def groups(self) -> Iterator[ParameterGroup]:
        """The parameters to optimise."""
        if self.factors.requires_grad:
            yield ParameterGroup([self.factors], "continuous", 1.0)

    def penalty(self) -> Tensor | None:
        """A term that the loss should include, the same for every step's data."""
        return None

    @torch.no_grad()
    def after_step(self, fraction: float, progress: float) -> dict[nn.Parameter, Tensor]:
        """Change codes, at most ``fraction`` of them where codes move freely; ``progress`` is the share of the steps that is done.
        Returns, for parameters whose momentum is stale because of it, a mask of the elements.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors that a snapshot needs besides the parameters."""
        return {}

    def restore(self, name: str, value: Tensor) -> None:
        """Restore one entry of :meth:`state`."""
        raise KeyError(name)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        """The tensors of the weight's format."""
        if self.coder.can_rescale:
            self.coder.rescale(self.factors[:, 0])
            self.factors.fill_(1.0)
        return self.coder.pack()


class CodebookWeight(TrainableWeight):
    """A codebook weight: scales, and the layer's own codebooks if it has some."""

    coder: CodebookCoder

    def __init__(self, coder: CodebookCoder, train_codebooks: bool) -> None:
        super().__init__(coder)
        self.codebooks = nn.Parameter(coder.codebooks.clone(), requires_grad=train_codebooks and coder.stored is not None)
        self.spread = float(coder.codebooks.square().mean().sqrt())

    def forward(self) -> Tensor:
        if not self.codebooks.requires_grad:
            return self.coder.values * self.factors
        return self.coder.values_of(self.codebooks) * self.factors

    def groups(self) -> Iterator[ParameterGroup]:
        yield from super().groups()
        if self.codebooks.requires_grad:
            yield ParameterGroup([self.codebooks], "continuous", self.spread)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        if self.coder.stored is not None:
            self.coder.replace_codebooks(self.codebooks)
        return super().pack()

    def _vector_scales(self) -> Tensor:
        """Scale of every vector, ``[rows, vectors, 1]``."""
        vectors = self.coder.codes.shape[1]
        scales = torch.cat([self.coder.scale(slice(v * self.coder.step, None)) for v in range(vectors)], 1)
        return (scales * self.factors)[..., None]


class PVWeight(CodebookWeight):
    """PV-Tuning (Malinovskii et al. 2024): the gradient also moves straight-through weights, which begin at the quantized ones;
    after each step the vectors that have drifted furthest are encoded anew."""

    def __init__(self, coder: CodebookCoder, train_codebooks: bool) -> None:
        super().__init__(coder, train_codebooks)
        self.unit = float(coder.values.square().mean().sqrt())
        self.drift = nn.Parameter(torch.zeros_like(coder.values))  # from the quantized weight, in units of its spread

    def forward(self) -> Tensor:
        return super().forward() + (self.drift - self.drift.detach()) * self.unit

    def groups(self) -> Iterator[ParameterGroup]:
        yield from super().groups()
        yield ParameterGroup([self.drift], "codes", 1.0)

    @torch.no_grad()
    def after_step(self, fraction: float, progress: float) -> dict[nn.Parameter, Tensor]:
        rows, vectors, _ = self.coder.codes.shape
        size, columns = self.coder.step, self.coder.columns
        drift = F.pad(self.drift, (0, vectors * size - columns)).view(rows, vectors, size)
        distance = drift.square().sum(2)
        count = min(distance.numel(), max(1, int(fraction * distance.numel())))
        row, vector = torch.unravel_index(distance.view(-1).topk(count).indices, (rows, vectors))
        scales = self._vector_scales()[row % len(self._vector_scales()), vector]
        old_codes = self.coder.codes[row, vector]
        books = self.codebooks.detach()
        old = decode(old_codes, books) * scales
        wanted = old + drift[row, vector] * self.unit
        codes = encode(wanted / torch.where(scales == 0, 1, scales), books.contiguous(), BEAM)
        new = decode(codes, books) * scales
        better = (wanted - new).square().sum(1) < (wanted - old).square().sum(1)
        row, vector = row[better], vector[better]
        self.coder.codes[row, vector] = codes[better]
        left = (wanted - new)[better] / self.unit  # the straight-through weight stays where it is; the quantized one has moved
        padded, changed = drift.clone(), torch.zeros_like(drift, dtype=torch.bool)
        padded[row, vector], changed[row, vector] = left, True
        self.drift.copy_(padded.view(rows, -1)[:, :columns])
        self.coder.refresh(row, vector)
        return {self.drift: changed.view(rows, -1)[:, :columns]}

    def state(self) -> dict[str, Tensor]:
        return {"codes": self.coder.codes}

    def restore(self, name: str, value: Tensor) -> None:
        self.coder.codes = value.to(self.coder.codes)
        self.coder.decode_all()


class CandidateWeight(CodebookWeight):
    """VQ4DiT: each vector is a mixture of its nearest entries, whose ratios training drives to one of them."""

    def __init__(self, coder: CodebookCoder, dense: Tensor, tuning: Tuning) -> None:
        super().__init__(coder, tuning.codebooks != "fixed")
        self.wait_for_codes = tuning.codebooks == "after"
        rows, vectors, books = coder.codes.shape
        if books != 1:
            raise ValueError(f'candidates need one codebook, this format has {books}; use assignments="pv"')
        scales = self._vector_scales().expand(rows, vectors, 1)
        points = F.pad(dense, (0, vectors * coder.step - coder.columns)).view(rows, vectors, -1)
        points = (points / torch.where(scales == 0, 1, scales)).flatten(0, 1)
        found, distances = nearest_few(points, coder.codebooks[0], tuning.candidates)
        self.candidates = found.view(rows, vectors, -1)
        self.logits = nn.Parameter(self._start(distances.sqrt(), tuning.start).view(rows, vectors, -1))
        self.strength = tuning.regularizer
        self.settled: Tensor = torch.zeros(rows, vectors, dtype=torch.bool, device=dense.device)
        if tuning.candidates == 1:
            self.settled.fill_(True)

    @staticmethod
    def _start(distances: Tensor, start: str) -> Tensor:
        if start == "uniform":
            return torch.zeros_like(distances)
        return (distances[:, -1:] / (distances + 1e-5)).log()

    def forward(self) -> Tensor:
        ratios = self._ratios()
        books = self.codebooks[0] if not (self.wait_for_codes and not bool(self.settled.all())) else self.codebooks[0].detach()
        values = (F.embedding(self.candidates, books) * ratios[..., None]).sum(2)
        return values.flatten(1)[:, : self.coder.columns] * self._column_scales() * self.factors

    def groups(self) -> Iterator[ParameterGroup]:
        yield from super().groups()
        yield ParameterGroup([self.logits], "codes", 1.0)

    def penalty(self) -> Tensor | None:
        if bool(self.settled.all()):
            return None
        ratios = self._ratios()
        return self.strength * ratios.shape[2] * (ratios * (1 - ratios)).mean()

    @torch.no_grad()
    def after_step(self, fraction: float, progress: float) -> dict[nn.Parameter, Tensor]:
        surest = self._ratios().amax(2)
        self.settled |= surest > SURE
        self.settled.view(-1)[due_to_settle(surest, self.settled, progress)] = True
        return {}

    def state(self) -> dict[str, Tensor]:
        return {"settled": self.settled}

    def restore(self, name: str, value: Tensor) -> None:
        self.settled = value.to(self.settled)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        choice = self.logits.argmax(2, keepdim=True)
        self.coder.codes = self.candidates.gather(2, choice)
        return super().pack()

    def _ratios(self) -> Tensor:
        ratios = self.logits.softmax(2)
        sure = F.one_hot(self.logits.argmax(2), self.logits.shape[2]).to(ratios.dtype)
        return torch.where(self.settled[..., None], sure, ratios)

    def _column_scales(self) -> Tensor:
        scales = (self._vector_scales() / self.factors[:, None]).detach()
        return scales.expand(-1, -1, self.coder.step).flatten(1)[:, : self.coder.columns]


def due_to_settle(sureness: Tensor, settled: Tensor, progress: float) -> Tensor:
    """Flat indices of the choices that settle after a step: the surest of the open ones, at a rate by which all have settled after
    ``SETTLED_BY`` of the steps. The choices still open compensate for the change that each settling makes; if all stayed open to
    the end, they would change at once.
    """
    missing = int(min(1.0, progress / SETTLED_BY) * settled.numel()) - int(settled.sum())
    return sureness.masked_fill(settled, -1).view(-1).topk(max(missing, 0)).indices


class RoundedWeight(TrainableWeight):
    """Learned rounding on any scalar format's own grid: each weight goes to the level below it or to the one above, whichever
    serves the outputs. On a floating-point grid the distance of the two depends on the weight's exponent.

    Shares between the two levels are AdaRound's (Nagel et al. 2020) rectified sigmoids. Its annealed penalty, which needs thousands
    of steps to close them all, is replaced by :func:`due_to_settle`.

    Args:
        coder: codes of an integer or minifloat format.
        dense: float32 ``[rows, columns]``, the weights to round.
    """

    coder: ScalarCoder

    def __init__(self, coder: ScalarCoder, dense: Tensor) -> None:
        super().__init__(coder)
        scale, zero, self.below, self.above = coder.neighbours(dense)
        self.scale, self.zero = scale, zero
        low, high = coder.levels_of(self.below), coder.levels_of(self.above)
        self.low, self.step = low, high - low
        share = (dense - zero) / torch.where(scale == 0, 1, scale) - low
        share = (share / torch.where(self.step == 0, 1, self.step)).clamp(0, 1)
        self.logits = nn.Parameter(-((STRETCH / (share - LOWEST)) - 1).log())

    def forward(self) -> Tensor:
        return ((self.low + self._share() * self.step) * self.scale + self.zero) * self.factors

    def groups(self) -> Iterator[ParameterGroup]:
        yield from super().groups()
        yield ParameterGroup([self.logits], "codes", 1.0)

    @torch.no_grad()
    def after_step(self, fraction: float, progress: float) -> dict[nn.Parameter, Tensor]:
        share = self._share()
        chosen = due_to_settle((share - 0.5).abs(), (share == 0) | (share == 1), progress)
        self.logits.view(-1)[chosen] = torch.where(share.view(-1)[chosen] < 0.5, -SETTLED, SETTLED)
        return {}

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        self.coder.take(torch.where(self._share() < 0.5, self.below, self.above))
        return super().pack()

    def _share(self) -> Tensor:
        """How far from the level below to the one above, ``[rows, columns]``: a sigmoid that reaches 0 and 1."""
        return (self.logits.sigmoid() * STRETCH + LOWEST).clamp(0, 1)


def make_trainable(
    fmt: WeightFormat, tensors: dict[str, Tensor], columns: int, dense: Tensor | None, tuning: Tuning
) -> TrainableWeight:
    """The trainable form of a packed weight.

    Args:
        fmt, tensors: the packed weight, without its low-rank branch.
        columns: number of columns of its matrix.
        dense: float32 ``[rows, columns]``, the matrix that it approximates; needed for "candidates" and "rounding".
        tuning: settings.
    """
    coder = make_coder(fmt, tensors, columns, BEAM)
    if isinstance(coder, ScalarCoder):
        return RoundedWeight(coder, dense) if tuning.assignments == "rounding" and dense is not None else TrainableWeight(coder)
    assert isinstance(fmt, CodebookFormat)
    if tuning.assignments == "candidates" and dense is not None:
        return CandidateWeight(coder, dense, tuning)
    if tuning.assignments == "pv":
        return PVWeight(coder, tuning.codebooks != "fixed")
    return CodebookWeight(coder, tuning.codebooks != "fixed")
