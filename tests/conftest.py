"""Settings for every test: one thread, fixed seeds, no progress bars, no time limit per property-test example."""

from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("qdiff", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qdiff")
torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
