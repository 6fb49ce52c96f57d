"""Settings for the kernel tests: one thread, fixed seeds, no time limit per property-test example; Triton interpreted, or its
compiled kernels run by ``ptx``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from ptx import COMPILED_FOR

if not COMPILED_FOR and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
settings.register_profile("kernels", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kernels")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where QDIFF_COMPILED_FOR says so, launches run as compiled for that GPU."""
    if not COMPILED_FOR:
        yield
        return
    from compile_kernels import UNITS
    from ptx.launches import executed
    from qdiff_kernels.gpu import ops

    monkeypatch.setattr(ops, "matrix_units", lambda device: UNITS[COMPILED_FOR])
    monkeypatch.setattr(ops, "runs_on", lambda tensor: True)
    with executed(COMPILED_FOR):
        yield
