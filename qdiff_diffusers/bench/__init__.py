"""Benchmarks of speed: layers and whole models with qdiff's formats and every installed peer's, timed in turn in one run.

``timing`` measures times, ``measuring.contenders`` defines a contender, ``ours`` and ``measuring.peers`` build them, ``layers`` and
``models`` are the two benchmarks, ``results`` stores the measurements and ``report`` writes the tables.
"""

from __future__ import annotations
