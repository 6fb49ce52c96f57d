"""Namespace of the custom ops. The Hub's kernel builder replaces this file with one that carries a build hash."""

from __future__ import annotations

import torch

NAMESPACE = "qdiff"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """``"codebook_linear"`` -> ``"qdiff::codebook_linear"``."""
    return f"{NAMESPACE}::{op_name}"
