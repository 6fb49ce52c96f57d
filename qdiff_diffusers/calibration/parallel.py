"""Work divided among the processes of ``torchrun`` or ``accelerate launch``; a single process is a world of size 1."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def join() -> None:
    """Join the process group that a launcher has set the environment up for, if there is one."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_mine(index: int) -> bool:
    """Whether this process does piece ``index`` of the work."""
    return index % world_size() == rank()


def share(value: Any, owner: int) -> Any:
    """``value`` of process ``owner`` (modulo the world's size), in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=owner % world_size())
    return box[0]
