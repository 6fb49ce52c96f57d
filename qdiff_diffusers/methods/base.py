"""What a method is, and the one place where methods are registered.

A method is one object in one file: its config, how it chooses bits, and everything that the command line, ComfyUI, model cards,
reports and plots say about it. Packages of others register theirs through the entry point group ``qdiff.methods``; see
docs/development/add_a_method.md.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from diffusers.utils import logging
from torch import Tensor, nn

from ..errors import ConfigError
from ..formats import LayerSpec, WeightFormat, matrix_shape

if TYPE_CHECKING:
    from .config import QDiffConfig

ENTRY_POINTS = "qdiff.methods"
DEFAULT_METHOD = "svdquant"  # what command line and ComfyUI begin with
DENSE_BITS = 16
# A preset's codebooks outgrow a tiny layer, which costs nothing worth a word. Those with more entries must fit.
SMALL_CODEBOOK_BITS = 8
# Rows are padded to whole groups, so a group far longer than its row asks for memory that holds nothing. Defaults of 16 to 64 meet
# narrower layers; groups beyond this that are longer than the row are a mistake.
LONGEST_PADDED_GROUP = 1024
# Multiply-adds per weight that are refused, and how many in all a layer may always take. A core does some 3e10 a second: 10 hours
# for each billion weights. The slowest preset (aq, effort 3) takes a tenth of it.
MOST_OPERATIONS = 1e6
FREE_OPERATIONS = 1e12
OPERATIONS_PER_SECOND = 3e10

logger = logging.get_logger(__name__)

ConfigT = TypeVar("ConfigT", bound="QDiffConfig")
Stored = tuple[WeightFormat, dict[str, Tensor]]
Smoother = Callable[[Tensor], Stored]


class Option(NamedTuple):
    """A whole-number setting that graphical interfaces show beside bits and activations.

    Attributes:
        name: of the config's field.
        default, low, high: what is shown at first, and the limits.
        help: one sentence.
        unset: the number that stands for the config's own default, if any does.
    """

    name: str
    default: int
    low: int
    high: int
    help: str
    unset: int | None = None


class Method(ABC, Generic[ConfigT]):
    """How bits are chosen. Subclasses are registered by :func:`register_method` and hold no state.

    Attributes:
        config: the class of its settings; ``config.method_name`` is the method's name, ``config.bit_choices`` and
            ``config.activation_choices`` what it offers.
        label: short name, for rows of tables and legends of plots.
        title: what it is, in a few words, for a model card's first lines.
        summary: one line that tells it from the others.
        description: a model card's sentences about how it works.
        limits: a model card's markdown list of what to look out for.
        citation: BibTeX entry.
        colour: in plots; ``None`` for the next one of the plot's own.
        rotates: whether inputs are rotated where ``config.rotation`` is ``None``.
        slow: whether it takes much longer than rounding, so that benchmarks of speed quantize a few rows only.
        is_baseline: whether plots show it as what the others are held against.
        suggested_bits: the width that interfaces begin with.
        named_formats: values of ``weight_format`` that interfaces offer in place of a width.
        options: further settings that interfaces offer.
        few_rows_suffice: whether the error of some rows of a weight tells that of all, as bit allocation assumes.
    """

    config: ClassVar[type[QDiffConfig]]
    label: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    colour: ClassVar[str | None] = None
    rotates: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = False
    suggested_bits: ClassVar[float] = 4
    named_formats: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = ()
    few_rows_suffice: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.config.method_name

    @abstractmethod
    def formats(self, config: ConfigT, shape: tuple[int, int]) -> list[WeightFormat]:
        """The formats among which a weight matrix of ``shape [rows, columns]`` will find its own, the most likely first.

        Raises:
            ValueError: says which settings do not go together, or not with this shape.
        """

    @abstractmethod
    def quantize(self, matrix: Tensor, config: ConfigT, seed: int) -> Stored:
        """Format and tensors of a weight.

        Args:
            matrix: float32 ``[rows, columns]``, smoothed and rotated if that is wanted.
            config: settings, checked.
            seed: seeds everything random.

        Returns:
            One of the ``formats``, and its tensors; with ``low_rank_down [rank, columns]`` and ``low_rank_up [rows, rank]`` if a
            branch stands beside it.
        """

    def draft(self, matrix: Tensor, config: ConfigT, seed: int) -> Stored:
        """Like :meth:`quantize`, where codes will be chosen anew for the layer's inputs: only the rest needs to be good."""
        return self.quantize(matrix, config, seed)

    def check(self, config: ConfigT) -> None:
        """What the types of the fields do not say: settings that contradict one another. Called when a config is made.

        Raises:
            ValueError: names the settings.
        """

    def rank(self, config: ConfigT, shape: tuple[int, int]) -> int:
        """Rank of the branch beside a weight matrix, as far as it is known before the weights are."""
        return 0

    def layouts(self, config: ConfigT, shape: tuple[int, int]) -> list[tuple[WeightFormat, int]]:
        """What a weight matrix of ``shape [rows, columns]`` may end up as: formats, each with the rank of its branch."""
        return [(found, self.rank(config, shape)) for found in self.formats(config, shape)]

    def operations(self, config: ConfigT, shape: tuple[int, int]) -> float:
        """Multiply-adds that choosing codes takes, roughly, for methods in which settings can make them absurdly many."""
        return 0.0

    def inner(self, config: ConfigT) -> QDiffConfig | None:
        """The config of another method that does a part of the work, or ``None``."""
        return None

    def kernel_vectors(self, config: ConfigT, shape: tuple[int, ...]) -> bool:
        """Whether columns of a convolution's matrix should run through a kernel's taps before the next channel."""
        return False

    def smoother(self, config: ConfigT, seed: int) -> Smoother | None:
        """A quick version of :meth:`quantize` on which a smoothing of the inputs is searched, or ``None`` for no smoothing."""
        return None

    def for_module(self, config: ConfigT, model: nn.Module, name: str) -> QDiffConfig:
        """The config for one module, where methods treat some kinds of modules in a way of their own."""
        return config

    def stored_bits(self, config: ConfigT, shape: tuple[int, ...]) -> float:
        """Stored bits per weight of a weight of logical ``shape``, as far as a config tells them before the weights are seen."""
        matrix = matrix_shape(shape)
        spec = LayerSpec(self.formats(config, matrix)[0], rank=self.rank(config, matrix))
        return spec.bits_per_weight(shape)

    def check_layer(self, config: ConfigT, shape: tuple[int, ...]) -> None:
        """Whether a weight of logical ``shape`` can be quantized so, at a price that can be paid.

        Raises:
            ValueError: says why not, and the way out.
        """
        matrix = matrix_shape(shape)
        formats = self.formats(config, matrix)
        columns = matrix[1]
        for size in (getattr(weight_format, "group_size", None) for weight_format in formats):
            if isinstance(size, int) and size > max(columns, LONGEST_PADDED_GROUP):
                raise ConfigError(f'group_size {size} is longer than a row of {columns} weights; "row" is one scale per row')
        spec = LayerSpec(formats[0], rank=self.rank(config, matrix))
        bits = spec.bits_per_weight(shape)
        entries = getattr(formats[0], "codebook_bits", 0) if "codebooks" in formats[0].tensors(*matrix) else 0
        if entries > SMALL_CODEBOOK_BITS and bits >= DENSE_BITS:
            raise ConfigError(
                f"codebooks of 2^{entries} entries make it {bits:.0f} bits per weight, more than the {DENSE_BITS} it has; give a "
                'smaller codebook_bits, codebook="shared", or leave the layer out with modules_to_not_convert'
            )
        operations = self.operations(config, matrix)
        if operations > max(FREE_OPERATIONS, MOST_OPERATIONS * math.prod(matrix)):
            minutes = operations / OPERATIONS_PER_SECOND / 60
            raise ConfigError(
                f"{formats[0].describe()} would take about {minutes:.0f} minutes of a CPU core for this layer alone; "
                "give fewer or smaller codebooks, or less effort"
            )


class Registry(Mapping[str, Method[Any]]):
    """All methods by name. Those of other packages are looked for once, when a name is not known or all names are asked for."""

    def __init__(self) -> None:
        self._methods: dict[str, Method[Any]] = {}
        self._lock = threading.RLock()
        self._complete = False

    def add(self, method: Method[Any]) -> None:
        """Register a method.

        Raises:
            ConfigError: it has no name, or that of another one.
        """
        name = method.name
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"{type(method).__name__}.config.method_name must be a name such as my_method, got {name!r}")
        known = self._methods.get(name)
        if known is not None and _address(known) != _address(method):
            raise ConfigError(f"there is a method {name!r} already, {_address(known)}")
        self._methods[name] = method

    def __getitem__(self, name: str) -> Method[Any]:
        if not isinstance(name, str):
            raise KeyError(name)
        if name not in self._methods:
            self.load_entry_points()
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        self.load_entry_points()
        return iter(list(self._methods))

    def __len__(self) -> int:
        self.load_entry_points()
        return len(self._methods)

    def load_entry_points(self) -> None:
        """Register what installed packages offer; those that fail are left out, each with a warning."""
        with self._lock:
            if self._complete:
                return
            self._complete = True  # first, because a package being loaded may look up a method
            for entry in entry_points(group=ENTRY_POINTS):
                try:
                    self._load(entry)
                except Exception as error:  # anything can go wrong in others' code, which must not take the rest down
                    logger.warning(f"qdiff: method {entry.name!r} ({entry.value}) cannot be used: {type(error).__name__}: {error}")

    def _load(self, entry: EntryPoint) -> None:
        found = entry.load()
        if isinstance(found, type) and issubclass(found, Method):
            found = found()
        if isinstance(found, Method):
            if type(self._methods.get(found.name)) is not type(found):  # else importing it has registered it
                self.add(found)
        elif entry.name not in self._methods:
            raise ConfigError(f"it must be a Method, or a module that registers one of that name, got {found!r}")


def _address(method: Method[Any]) -> str:
    return f"{type(method).__module__}.{type(method).__qualname__}"


METHODS = Registry()
MethodT = TypeVar("MethodT", bound=type[Method[Any]])


def register_method(cls: MethodT) -> MethodT:
    """Class decorator: make a method known under its config's ``method_name``.

    Raises:
        ConfigError: it has no name, or that of another one.
    """
    METHODS.add(cls())
    return cls


def method_of(config: QDiffConfig) -> Method[Any]:
    """The method that a config belongs to.

    Raises:
        ConfigError: there is none of its name.
    """
    try:
        return METHODS[config.method_name]
    except KeyError as error:
        kind = type(config).__name__
        raise ConfigError(
            f"no method {config.method_name!r} is registered for {kind}; see qdiff_diffusers.register_method"
        ) from error


def default_first() -> list[Method[Any]]:
    """All methods, in the order in which interfaces offer them."""
    return sorted(METHODS.values(), key=lambda method: method.name != DEFAULT_METHOD)
