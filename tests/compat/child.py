"""What a spawned process of ``test_processes.py`` runs."""

from __future__ import annotations

import queue
from typing import Any

import tiny_models
import torch


def work(models: queue.Queue[Any], results: queue.Queue[Any]) -> None:
    """Run each pickled model that arrives; ``None`` ends it."""
    import pickle

    import qdiff_diffusers  # noqa: F401

    torch.set_num_threads(1)
    while (item := models.get()) is not None:
        name, model = item
        results.put((name, pickle.dumps(tiny_models.run(pickle.loads(model), "flux"))))
