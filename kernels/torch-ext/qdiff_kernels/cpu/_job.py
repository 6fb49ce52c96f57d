"""Layout of a job: the int64 numbers that a compiled kernel is given. Both sides of the call import the same positions."""

from __future__ import annotations

from ._threads import SLOT, TASK

__all__ = ["SLOT", "TASK"]

TASKS = 2  # number of tasks, each a block of rows (or tokens)
PER_TASK = 3  # rows in a task, a multiple of ROW_BLOCK
ROWS = 4
COLUMNS = 5
CODES = 6  # address
CODE_BYTES = 7  # bytes from one row's codes to the next one's
SCALES = 8  # address
SCALE_KIND = 9
SCALE_STRIDE = 10  # elements from one row's scales to the next one's, 0 if all rows share them
GROUPS = 11
GROUP_SIZE = 12
SCALE_TABLE = 13  # address of 256 float32, the value of a scale byte; then a factor of all scales; then the int8 span
ZEROS = 14  # address, or 0
TABLE = 15  # address of the levels or codebooks
TARGET = 16  # address of the dense weight
TARGET_STRIDE = 17  # bytes
ROW_SCALES = 18  # address of float32 [rows], scales of int8 rows, written
SCRATCH = 19  # address
SCRATCH_BYTES = 20  # per thread
TOKENS = 21  # 0: write the dense weight; else multiply by this many tokens
X = 22  # address of operands in the decoded type, rows padded with zeros to 64 bytes
X_STRIDE = 23  # bytes
Y = 24  # address of the result [tokens, rows]
Y_KIND = 25
BIAS = 26  # address of float32 [rows], or 0
TOKEN_SCALES = 27  # address of float32 [tokens], or 0
ADDEND = 28  # address of float32 [tokens, rows], or 0
VECTOR_SIZE = 29  # numbers in a codebook entry
LENGTH = 30

# Number formats of stored scales, and of results.
FLOAT32, FLOAT16, BFLOAT16, BYTE, E4M3 = range(5)

ROW_BLOCK = 4  # rows decoded and multiplied together
