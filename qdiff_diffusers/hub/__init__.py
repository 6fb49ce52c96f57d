"""Sharing quantized models on the Hugging Face Hub."""

from __future__ import annotations

from .cards import render_card, write_card

__all__ = ["render_card", "write_card"]
