"""A static roofline of the Triton kernels: what they compile to, and how fast a model says that would be. Nothing runs.

    devices    what the model assumes of each GPU
    record     which kernels and vendor products a layer launches, on tensors that exist in name only
    compiled   each distinct kernel compiled and disassembled, kept by a hash of source and target
    sass       instructions of a kernel's loops by class
    model      from instructions to cycles to microseconds: every number of it is a prediction
    table      rows of one layer at one number of tokens, and the tables made of them
    budgets    ceilings that a kernel may not exceed, and that only go down

``python benchmarks/gpu_static.py`` makes the tables.
"""
