"""Quantization configs: what a user asks for, and the ``quantization_config`` that config.json carries.

Each method's file defines one class; this module holds them all under the names that users import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .methods import METHODS as _METHODS
from .methods.aq import AQConfig
from .methods.config import ACTIVATION_SCALES, COMPUTE_DTYPES, FORMAT_VERSION, QDiffConfig, QDiffMethod, is_ours, is_stored
from .methods.fp import SEARCHES, FPConfig
from .methods.rtn import RTNConfig
from .methods.svdquant import RANK_SHARES, SVDQuantConfig
from .methods.vq import VQConfig

__all__ = [
    "ACTIVATION_SCALES",
    "COMPUTE_DTYPES",
    "FORMAT_VERSION",
    "METHODS",
    "RANK_SHARES",
    "SCALE_SEARCHES",
    "AQConfig",
    "FPConfig",
    "QDiffConfig",
    "QDiffMethod",
    "RTNConfig",
    "SVDQuantConfig",
    "VQConfig",
    "is_ours",
    "is_stored",
]

SCALE_SEARCHES = tuple(SEARCHES)


class _ConfigClasses(Mapping[str, type[QDiffConfig]]):
    """The registered methods' configs by the methods' names."""

    def __getitem__(self, name: str) -> type[QDiffConfig]:
        return _METHODS[name].config

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


METHODS = _ConfigClasses()
