"""GGUF files written and decoded by llama.cpp's ``gguf`` package, against our reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convert.test_single_files import random_blocks

from qdiff_diffusers.convert.gguf import KINDS, GgufFile

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 6, 512


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_a_file_of_the_gguf_package_is_read_number_by_number(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    blocks, _ = random_blocks(kind, ROWS, COLUMNS)
    data = np.frombuffer(blocks, np.uint8).reshape(ROWS, -1)
    norm = torch.randn(COLUMNS)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "flux")
    writer.add_tensor("w", data, raw_dtype=number)
    writer.add_tensor("norm", norm.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile(tmp_path / "one.gguf")
    pieces = file.tensors["w"].pieces
    values = file.format(pieces).dequantize(file.store(pieces, COLUMNS), COLUMNS, torch.float32)
    torch.testing.assert_close(values, torch.from_numpy(gguf.dequantize(data, number)), rtol=1e-6, atol=1e-7)
    assert torch.equal(file.tensors["norm"], norm)
