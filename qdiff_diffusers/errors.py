"""Errors that a user can act on. Each message names the value that is wrong and the way out."""

from __future__ import annotations


class QDiffError(ValueError):
    """Base class of qdiff's own errors."""


class ConfigError(QDiffError):
    """A quantization setting that cannot be used."""


class CheckpointError(QDiffError):
    """A stored checkpoint that cannot be read: unknown version, missing or misshapen tensor, truncated file."""


class HubError(QDiffError):
    """The Hub, or the way to it, refused: no access, too many requests, no space, no connection."""
