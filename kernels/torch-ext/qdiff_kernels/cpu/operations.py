"""Arithmetic of a linear layer by look-up tables, beside that of a dense one."""

from __future__ import annotations


def lookup_operations(rows: int, columns: int, num_codebooks: int, entries: int, vector_size: int, tokens: int) -> dict[str, float]:
    """Multiplications and additions of ``[tokens, columns]`` by a weight ``[rows, columns]`` of additive codebooks.

    Tables: for each token, vector and codebook the ``entries`` dot products of ``vector_size`` numbers. Sums: for each token and
    row one addition per vector and codebook, and one multiplication by the row's scale.

    Returns:
        ``dense_multiplications``, ``dense_additions``, ``lookup_multiplications``, ``lookup_additions``, ``lookups``, and
        ``multiplications_saved``, dense over look-up: about ``rows / (num_codebooks * entries)``.
    """
    vectors = -(-columns // vector_size)
    tables = tokens * vectors * num_codebooks * entries
    lookups = tokens * rows * vectors * num_codebooks
    multiplications = tables * vector_size + tokens * rows
    return {
        "dense_multiplications": tokens * rows * columns,
        "dense_additions": tokens * rows * (columns - 1),
        "lookup_multiplications": multiplications,
        "lookup_additions": tables * (vector_size - 1) + lookups - tokens * rows,
        "lookups": lookups,
        "multiplications_saved": tokens * rows * columns / multiplications,
    }
