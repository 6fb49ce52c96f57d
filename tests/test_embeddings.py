"""Packed embedding tables, by themselves and in text encoders whose other layers share them."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, QDiffError, RTNConfig, SVDQuantConfig, VQConfig, inspect_checkpoint
from qdiff_diffusers.layers import PackedLayer, dense_layer, pack_layer, unsupported_reason
from qdiff_diffusers.layers.embedding import QDiffEmbedding
from qdiff_diffusers.methods import quantize_weight
from qdiff_diffusers.model.packing import packed_layers

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

METHODS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "nvfp4": lambda: FPConfig(weight_format="nvfp4"),
    "fp-tensor": lambda: FPConfig(weight_format="e3m2", group_size="tensor"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, rotation=True),
    "rtn": lambda: RTNConfig(bits=8, group_size=16),
}
SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0}
T5 = {"vocab_size": 80, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def clip():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, max_position_embeddings=16, eos_token_id=1))


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def umt5():
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))


def gemma2():
    return transformers.Gemma2Model(transformers.Gemma2Config(**DECODER))


def qwen3_with_a_tied_head():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, tie_word_embeddings=True))


def qwen3_with_a_head_of_its_own():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, tie_word_embeddings=False))


# The encoder, part of its table's name, and how many layers use that table.
ENCODERS = {
    "clip": (clip, "token_embedding", 1),
    "t5": (t5, "shared", 2),
    "umt5": (umt5, "embed_tokens", 2),
    "gemma2": (gemma2, "embed_tokens", 1),  # multiplies its rows by a constant
    "tied": (qwen3_with_a_tied_head, "embed_tokens", 2),
    "untied": (qwen3_with_a_head_of_its_own, "embed_tokens", 1),
}
TOKENS = torch.tensor([[0, 5, 9, 33, 60, 2, 7, 1]])


def packed_table(config: QDiffConfig, rows: int = 50, columns: int = 48, **options) -> tuple[nn.Embedding, QDiffEmbedding]:
    dense = nn.Embedding(rows, columns, **options)
    spec, tensors, _ = quantize_weight(dense.weight, config)
    layer = nn.Embedding(rows, columns, **options)
    return dense, pack_layer(layer, spec, torch.float32, tensors)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5)], ids=str)
def test_a_lookup_gives_the_rows_of_the_decoded_table(config, shape):
    _, packed = packed_table(config())
    index = torch.randint(0, 50, shape)
    found = packed(index)
    assert found.shape == (*shape, 48) and found.dtype == torch.float32
    torch.testing.assert_close(found, nn.functional.embedding(index, packed.weight), rtol=1e-5, atol=1e-6)


def test_only_the_rows_asked_for_are_decoded(monkeypatch):
    """A table of a text encoder is as large as a hundred of its other layers."""
    _, packed = packed_table(RTNConfig(bits=4))
    monkeypatch.setattr(QDiffEmbedding, "dequantize", lambda *args: pytest.fail("the whole table was decoded"))
    assert packed(torch.tensor([3, 3, 7])).shape == (3, 48)


@pytest.mark.parametrize("index", [50, -1])
def test_an_index_outside_the_table_is_an_error(index):
    _, packed = packed_table(RTNConfig(bits=4))
    with pytest.raises((IndexError, RuntimeError)):
        packed(torch.tensor([index]))


def test_a_packed_table_becomes_an_ordinary_one_again():
    dense, packed = packed_table(RTNConfig(bits=8), padding_idx=3)
    assert isinstance(packed, nn.Embedding) and packed.padding_idx == 3
    again = dense_layer(packed)
    assert type(again) is nn.Embedding
    assert (again.weight - dense.weight).norm() / dense.weight.norm() < 0.02


def test_a_lookup_compiles_into_one_graph():
    _, packed = packed_table(FPConfig(weight_format="nvfp4"))
    index = torch.tensor([[1, 2, 3]])
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), packed(index))


def test_a_table_that_renormalises_its_rows_is_left_alone():
    assert "renormalises" in str(unsupported_reason(nn.Embedding(4, 8, max_norm=1.0)))
    assert unsupported_reason(nn.Embedding(4, 8)) is None


def load(name: str, folder, config: QDiffConfig | None = None, **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    return type(ENCODERS[name][0]()).from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def encode(model: nn.Module) -> torch.Tensor:
    output = model(TOKENS, output_hidden_states=True)
    return torch.cat([output.hidden_states[-1].flatten(), output.get("logits", torch.zeros(0)).flatten()])


def tables(model: nn.Module) -> list[PackedLayer]:
    """The packed layers as large as the vocabulary."""
    return [m for m in model.modules() if isinstance(m, PackedLayer) and m.weight_shape == (80, 32)]


def config_for(name: str) -> RTNConfig:
    table = RTNConfig(bits=8, group_size=16, activations="int8")
    return RTNConfig(bits=8, group_size=16, overrides={ENCODERS[name][1]: table})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    for name, (make, *_) in ENCODERS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_a_packed_table_survives_saving_and_reloading(name, folders, tmp_path):
    exact = encode(load(name, folders / name))
    model = load(name, folders / name, config_for(name))
    output = encode(model)
    assert (output - exact).norm() / exact.norm() < 0.05
    users = tables(model)
    assert len(users) == ENCODERS[name][2]
    assert all(user.codes is users[0].codes and user.scales is users[0].scales for user in users)
    assert users[0].spec.activations == "none"  # a lookup has no inputs to quantize
    model.save_pretrained(tmp_path)
    stored = inspect_checkpoint(tmp_path)
    assert [layer.shape for layer in stored.layers].count((80, 32)) == 1
    reloaded = load(name, tmp_path)
    assert torch.equal(encode(reloaded), output)
    assert reloaded.get_memory_footprint() == model.get_memory_footprint()
    reloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(encode(load(name, tmp_path / "again")), output)


@pytest.mark.parametrize("name", ["umt5", "tied", "gemma2"])
def test_layers_that_share_a_table_share_it_again_when_dequantized(name, folders, tmp_path):
    model = load(name, folders / name, config_for(name))
    output = encode(model)
    model.dequantize()
    assert not tables(model)
    torch.testing.assert_close(encode(model), output, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(encode(load(name, tmp_path)), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "tied"])
def test_a_missing_table_is_refused_by_name(name, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    from qdiff_diffusers import CheckpointError

    load(name, folders / name, config_for(name)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (lost,) = [key for key, tensor in tensors.items() if key.endswith("codes") and len(tensor) == 80]
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost):
        load(name, tmp_path)


def test_tables_stay_as_they_are_unless_an_override_names_them(folders):
    model = load("t5", folders / "t5", RTNConfig(bits=8, group_size=16, keep_outer_layers=False))
    assert not tables(model)
    assert "overrides" in model.config.quantization_config.skipped["shared"]


def test_a_table_in_a_transformer_is_packed_on_request(tmp_path):
    """DiT's class labels."""
    tiny_models.make("dit").save_pretrained(tmp_path / "dense")
    kind = type(tiny_models.make("dit"))
    config = RTNConfig(bits=8, group_size=16, overrides={"embedding_table": RTNConfig(bits=8, group_size=16)})
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert sum(isinstance(module, QDiffEmbedding) for module in model.modules()) >= 1
    model.save_pretrained(tmp_path / "packed")
    output = tiny_models.run(model, "dit")
    assert torch.equal(tiny_models.run(kind.from_pretrained(tmp_path / "packed"), "dit"), output)
    exact = tiny_models.run(kind.from_pretrained(tmp_path / "dense"), "dit")
    assert (output - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", ENCODERS)
def test_a_packed_table_becomes_dense_when_tokens_are_added(name, folders, tmp_path):
    """Layers that share it, too; everything else stays packed, and the model can be saved, reloaded and dequantized."""
    model = load(name, folders / name, config_for(name))
    table, packed = model.get_input_embeddings().weight.clone(), len(packed_layers(model))
    before = encode_hidden(model)
    model.resize_token_embeddings(84, mean_resizing=False)
    assert not tables(model)
    assert len(packed_layers(model)) == packed - ENCODERS[name][2]
    weight = model.get_input_embeddings().weight
    assert weight.shape == (84, 32) and torch.equal(weight[:80], table)
    torch.testing.assert_close(encode_hidden(model), before, rtol=1e-5, atol=1e-5)
    weight.data[83] = 3.0  # as load_textual_inversion writes it
    expected = encode(model)
    model.save_pretrained(tmp_path)
    reloaded = load(name, tmp_path)
    assert torch.equal(encode(reloaded), expected)
    assert torch.equal(reloaded.get_input_embeddings().weight[83], torch.full((32,), 3.0))
    if name == "tied":
        assert model.lm_head.weight is weight and reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    torch.testing.assert_close(encode(model.dequantize()), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def encode_hidden(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("method", METHODS)
def test_a_table_of_any_method_grows(method, folders):
    config = RTNConfig(bits=8, group_size=16, overrides={"token_embedding": METHODS[method]()})
    model = load("clip", folders / "clip", config)
    table = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(82)
    assert torch.equal(model.get_input_embeddings().weight[:80], table)


def test_one_line_says_that_a_table_becomes_dense(folders, monkeypatch):
    from qdiff_diffusers.integrations import token_tables

    lines = []
    monkeypatch.setattr(token_tables.logger, "warning", lines.append)
    model = load("t5", folders / "t5", config_for("t5"))
    model.resize_token_embeddings()  # only asks for the table
    assert not lines and tables(model)
    model.resize_token_embeddings(81)
    model.resize_token_embeddings(82)
    assert lines == ["tokens are added to T5EncoderModel: its packed token table shared becomes dense"]


@pytest.mark.parametrize("kind", ["sequential", "leaves", "disk"])
def test_the_table_of_an_offloaded_encoder_grows(kind, folders, tmp_path):
    import accelerate
    from diffusers.hooks import apply_group_offloading

    model, cpu = load("clip", folders / "clip", config_for("clip")), torch.device("cpu")
    before = encode_hidden(model)
    if kind == "sequential":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        disk = {"offload_to_disk_path": str(tmp_path)} if kind == "disk" else {}
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", **disk)
    if kind == "sequential":  # transformers itself reads the table, which is not there
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    model.resize_token_embeddings(84, mean_resizing=False)
    torch.testing.assert_close(encode_hidden(model), before, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_quantized_model_cannot_add_tokens(folders):
    model = load("tied", folders / "tied", config_for("tied"))
    expected = encode(model)
    with pytest.raises(QDiffError, match="only the whole model"):
        model.model.resize_token_embeddings(84)
    assert torch.equal(encode(model), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_textual_inversion_writes_into_the_table(packed, folders, tmp_path):
    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map, _exclude_from_cpu_offload = None, ()

        def __init__(self, tokenizer, text_encoder):
            self.tokenizer, self.text_encoder = tokenizer, text_encoder

        @property
        def components(self):
            return {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(78)}, unk_token="w0"))  # a row to spare
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    model = load("clip", folders / "clip", config_for("clip") if packed else None)
    before = encode_hidden(model)
    Pipeline(tokenizer, model).load_textual_inversion({"<cat>": torch.full((32,), 3.0)})
    index = tokenizer.convert_tokens_to_ids("<cat>")
    assert torch.equal(model.get_input_embeddings()(torch.tensor([index]))[0], torch.full((32,), 3.0))
    torch.testing.assert_close(encode_hidden(model), before, rtol=1e-5, atol=1e-5)
