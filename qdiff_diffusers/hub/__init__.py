"""Sharing quantized models on the Hugging Face Hub."""

from __future__ import annotations

from .cards import render_card, write_card
from .evaluated import Evaluated, read_evaluation
from .push import push_folder
from .results import Result, Results, read_results, write_results

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
