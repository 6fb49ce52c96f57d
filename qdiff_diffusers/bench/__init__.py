"""Speed beside the peers: layers and whole models, ours and every installed peer, timed in turn in one run.

``timing`` takes the times, ``contenders`` says who runs, ``ours`` and ``peers`` build them, ``layers`` and ``models`` are the two
benchmarks, ``results`` keeps what was measured and ``report`` writes it down.
"""

from __future__ import annotations
