"""Settings for every test: one thread, fixed seeds, no progress bars, no time limit per example; Triton interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # For the kernels' tests, which may share this process: Triton decides when it is first imported, which diffusers does.
    os.environ["TRITON_INTERPRET"] = "1"

import diffusers
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("qdiff", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qdiff")
torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
