"""Runs the PTX that Triton compiles, on the CPU: what a GPU of compute capability 8.0 or 8.9 would do, with every address checked.

Triton's own interpreter runs a kernel's source. Here its compiled form is run, after layouts, pipelines, masks and conversions have
become instructions. ``text.py`` reads a program, ``instructions.py`` says what instructions do and ``floats.py`` which numbers they
mean, ``machine.py`` has threads, memory and their order, ``launches.py`` puts all of it behind the kernels' own host code.

    QDIFF_COMPILED_FOR=cuda:80 python -m pytest kernels/tests/test_gpu.py kernels/tests/test_gpu_decode.py

runs the tests of the kernels in this way.
"""

from __future__ import annotations

import os

COMPILED_FOR = os.environ.get("QDIFF_COMPILED_FOR")
