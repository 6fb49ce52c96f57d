"""Calibration: better bits from what the model sees on its own trajectories. No training data."""

from __future__ import annotations

from .run import calibrate, check_places, discard_workspace
from .settings import Calibration, Tuning, as_calibration

__all__ = ["Calibration", "Tuning", "as_calibration", "calibrate", "check_places", "discard_workspace"]
