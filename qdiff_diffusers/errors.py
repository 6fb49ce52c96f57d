"""Errors that a user can act on. Each message names the value that is wrong and the way out."""

from __future__ import annotations

MAX_MESSAGE = 1000


class QDiffError(ValueError):
    """Base class of qdiff's own errors. An overlong message is cut."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ...")


class ConfigError(QDiffError):
    """A quantization setting that cannot be used."""


class CheckpointError(QDiffError):
    """A stored checkpoint that cannot be read: unknown version, missing or misshapen tensor, truncated file."""


class OutputError(QDiffError):
    """A result that could not be written, for want of space for instance. Nothing is half-written."""


class HubError(QDiffError):
    """A request to the Hub failed: no access, too many requests, no space, no connection."""


class CalibrationError(QDiffError):
    """A calibration cannot go on. Its finished work stays in the workspace, from which another run resumes."""
