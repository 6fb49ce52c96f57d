"""Sharing quantized models on the Hugging Face Hub."""

from __future__ import annotations

from ..checkpoint.results import Result, Results, read_results, write_results
from ..evaluation.published import Evaluated, read_evaluation
from .cards import render_card, write_card
from .push import push_folder

__all__ = [
    "Evaluated",
    "Result",
    "Results",
    "push_folder",
    "read_evaluation",
    "read_results",
    "render_card",
    "write_card",
    "write_results",
]
