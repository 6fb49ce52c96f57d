"""Sharing quantized models on the Hugging Face Hub."""

from __future__ import annotations

from .cards import render_card, write_card
from .push import push_folder
from .results import Result, Results, read_results, write_results

__all__ = ["Result", "Results", "push_folder", "read_results", "render_card", "write_card", "write_results"]
