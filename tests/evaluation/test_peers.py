"""Other packages' layers as rows, and our K-quant encoder."""

from __future__ import annotations

import pytest
import torch
from evaluate_tiny import evaluated

from qdiff_diffusers.evaluation import peers
from qdiff_diffusers.measuring import k_quants
from qdiff_diffusers.measuring.contenders import Contender
from qdiff_diffusers.measuring.peers import UnchangedError


class TestPeers:
    @pytest.fixture
    def halved(self, monkeypatch):
        """A peer that rounds every 3x3 kernel to float16, and leaves 1x1 convolutions alone."""

        class Halved(torch.nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.weight = torch.nn.Parameter(layer.weight.data.half(), requires_grad=False)
                self.bias, self.settings = layer.bias, (layer.stride, layer.padding)

            def forward(self, x):
                return torch.nn.functional.conv2d(x, self.weight.to(x), self.bias.to(x), *self.settings)

        def convert(layer):
            if layer.weight.shape[-1] == 1:
                raise UnchangedError("left the layer as it was")
            return Halved(layer)

        peer = Contender("halved", "test", convert, 16, layers=(torch.nn.Conv2d,))
        monkeypatch.setitem(peers.PEERS, "halved", peer)
        return peer

    def test_convert_what_they_can_and_the_row_says_how_much(self, of_noise, tmp_path, halved):
        row = evaluated(of_noise, ["halved"], tmp_path)["rows"][1]
        assert 0 < row["layers"] < row["target_layers"] and row["method"] == "test"
        assert "layers, the others stay in 16 bits" in (tmp_path / "table.md").read_text()
        assert row["bits_per_weight"] == pytest.approx(16, abs=0.01)

    def test_that_take_no_layer_are_failed_rows(self, by_class, tmp_path, halved):
        assert evaluated(by_class, ["halved"], tmp_path, classes=[0])["rows"][1]["failed"].startswith(
            "UnchangedError: halved takes none"
        )

    def test_that_are_missing_are_failed_rows(self, by_class, tmp_path, monkeypatch):
        absent = Contender("absent", "test", lambda layer: layer, 4, install="absent-package", modules=("no_such_module",))
        monkeypatch.setitem(peers.PEERS, "absent", absent)
        row = evaluated(by_class, ["absent"], tmp_path, classes=[0])["rows"][1]
        assert row["failed"] == "ConfigError: absent: not installed: pip install absent-package"

    def test_linear_ones_are_drawn_with_as_plain_layers_and_others_are_not(self):
        class Decoding(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x.round() if self.rounds and len(x) >= 32 else x)  # of few inputs SDNQ rounds none

        model = torch.nn.ModuleDict({"weights": Decoding(6, 3), "inputs": Decoding(6, 3, bias=False)})
        model["weights"].rounds, model["inputs"].rounds = False, True
        x = torch.randn(5, 6)
        expected = model["weights"](x)
        assert peers.make_dense(model, ["weights", "inputs"]) == 1
        assert type(model["weights"]) is torch.nn.Linear and type(model["inputs"]) is Decoding
        assert torch.allclose(model["weights"](x), expected, atol=1e-6)

    def test_stored_bits_count_every_tensor_but_the_bias(self):
        layer = torch.nn.Linear(8, 4)
        model = torch.nn.ModuleDict({"dense": layer, "other": torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))})
        model["other"].register_buffer("scales", torch.zeros(4))
        assert peers.stored_bits(model, {"dense": (4, 8)}) == 16
        assert peers.stored_bits(model, {"other": (4, 8)}) == 8 * (4 * 8 * 4 + 4 * 4) / 32


K_QUANT_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144}  # of a super-block, from ggml's definitions
K_QUANT_ERRORS = {"Q2_K": 0.08, "Q3_K": 0.0227, "Q4_K": 0.0054}


class TestKQuants:
    @pytest.mark.parametrize("kind", K_QUANT_BYTES)
    def test_have_the_size_of_ggmls_blocks(self, kind):
        assert k_quants.quantize(torch.randn(3, 512), kind).shape == (3, 2 * K_QUANT_BYTES[kind])

    @pytest.mark.parametrize("kind", K_QUANT_BYTES)
    def test_are_read_by_the_gguf_package_with_a_small_error(self, kind):
        gguf = pytest.importorskip("gguf")
        weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        weight[0] = 0
        data = k_quants.quantize(weight, kind)
        decoded = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
        assert (decoded - weight).square().sum() / weight.square().sum() < K_QUANT_ERRORS[kind]
        assert not decoded[0].any()

    def test_refuse_columns_that_do_not_divide(self):
        with pytest.raises(ValueError, match="blocks of 256 weights, the layer has 100 columns"):
            k_quants.quantize(torch.randn(2, 100), "Q4_K")


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name.startswith("comfy-kitchen")])
@pytest.mark.parametrize("shape", [(24, 64), (100, 256)], ids=str)
def test_comfy_kitchens_layouts_multiply_what_they_store(name, shape):
    pytest.importorskip("comfy_kitchen")
    peer, (rows, columns) = peers.PEERS[name], shape
    layer, x = torch.nn.Linear(columns, rows), torch.randn(2, 33, columns)
    built = peer.build(layer)
    with torch.no_grad():
        error = float((built(x) - layer(x)).norm() / layer(x).norm())
    assert error < (0.3 if peer.bits == 4 else 0.05)
    assert peers.resident_bytes(built) < peers.resident_bytes(layer)
