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


def work_in_parallel(rank: int, meeting_point: str, models: queue.Queue[Any], results: queue.Queue[Any]) -> None:
    """The same, as one of two ranks that share the work on a sequence."""
    import pickle

    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    import qdiff_diffusers  # noqa: F401

    torch.set_num_threads(1)
    # diffusers counts accelerators to give each rank one; everything else that it does runs on a CPU too.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    while (item := models.get()) is not None:
        name, pickled = item
        model = pickle.loads(pickled)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        output = tiny_models.run(model, "flux").clone()  # which waits for the other rank's half
        results.put((name, rank, pickle.dumps(output)))
    dist.destroy_process_group()
