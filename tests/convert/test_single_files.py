"""GGUF and Black Forest Labs' files: every weight exactly what the format says, under diffusers' names, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4
from flux_layout import narrow_converter, original_layout
from safetensors.torch import save_file
from scaled_files import description
from torch import nn

from qdiff_diffusers import CheckpointError, ConfigError
from qdiff_diffusers.convert import convert_bfl, convert_gguf
from qdiff_diffusers.convert.gguf import KINDS, GgufFile
from qdiff_diffusers.layers import PackedLayer

NUMBER = {kind.name: number for number, kind in KINDS.items()} | {"F32": 0, "F16": 1, "BF16": 30, "Q2_K": 10}
IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(data: bytes) -> float:
    return float(np.frombuffer(data, dtype=np.float16)[0])


def decode_block(kind: str, block: bytes) -> list[float]:
    """One block, weight by weight, from the format's definition."""
    if kind in ("Q4_K", "Q5_K"):
        return decode_k(kind, block)
    if kind == "Q6_K":
        return decode_q6_k(block)
    d = half(block[:2])
    if kind == "Q8_0":
        return [d * (byte - 256 if byte > 127 else byte) for byte in block[2:34]]
    has_minimum, five = kind in ("Q4_1", "Q5_1"), kind in ("Q5_0", "Q5_1")
    minimum = half(block[2:4]) if has_minimum else 0.0
    start = 4 if has_minimum else 2
    high = int.from_bytes(block[start : start + 4], "little") if five else 0
    nibbles = block[start + 4 :] if five else block[start:]
    out = []
    for i in range(32):
        code = (nibbles[i] & 15) if i < 16 else nibbles[i - 16] >> 4
        code |= (high >> i & 1) << 4
        if kind == "IQ4_NL":
            out.append(d * IQ4_NL[code])
        elif has_minimum:
            out.append(d * code + minimum)
        else:
            out.append(d * (code - (16 if five else 8)))
    return out


def decode_k(kind: str, block: bytes) -> list[float]:
    d, dmin, packed = half(block[:2]), half(block[2:4]), block[4:16]
    high, nibbles = (block[16:48], block[48:]) if kind == "Q5_K" else (bytes(32), block[16:])
    out = []
    for i in range(256):
        group, within = divmod(i, 32)
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            minimum = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        byte = nibbles[32 * (group // 2) + within]
        code = byte >> 4 if group % 2 else byte & 15
        code |= (high[within] >> group & 1) << 4
        out.append(d * scale * code - dmin * minimum)
    return out


def decode_q6_k(block: bytes) -> list[float]:
    low, high, d = block[:128], block[128:192], half(block[208:210])
    scales = np.frombuffer(block[192:208], dtype=np.int8)
    out = []
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, position = divmod(within, 32)
        byte = low[64 * part + 32 * (quarter % 2) + position]
        code = (byte >> 4 if quarter > 1 else byte & 15) | (high[32 * part + position] >> 2 * quarter & 3) << 4
        out.append(d * int(scales[i // 16]) * (code - 32))
    return out


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[bytes, torch.Tensor]:
    """Random blocks with scales of ordinary size, and their float64 values ``[rows, columns]``."""
    random = np.random.default_rng(seed)
    spec = KINDS[NUMBER[kind]]
    count = rows * columns // spec.weights
    blocks = random.integers(0, 256, (count, spec.nbytes), dtype=np.uint8)
    size = columns**-0.5 / (1000 if kind.endswith("K") else 100 if kind in ("Q8_0", "IQ4_NL") else 10)
    places = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(kind, [0])
    for place in places:
        blocks[:, place : place + 2] = (size * (1 + random.random((count, 1)))).astype(np.float16).view(np.uint8)
    values = [decode_block(kind, block.tobytes()) for block in blocks]
    return blocks.tobytes(), torch.tensor(values, dtype=torch.float64).view(rows, columns)


def write_gguf(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], version: int = 3) -> Path:
    """``{name: (type, shape, data)}``, with metadata of several types."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("flux")]
    pairs += [text("general.alignment") + struct.pack("<II", 4, 64)]
    pairs += [text("some.list") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<III", 1, 2, 3)]
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        data += b"\0" * (-len(data) % 64)
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", NUMBER[kind], len(data))
        data += content
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + infos
    path.write_bytes(header + b"\0" * (-len(header) % 64) + data)
    return path


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_every_block_format_is_stored_exactly(kind, tmp_path):
    data, values = random_blocks(kind, 6, 512)
    file = GgufFile(write_gguf(tmp_path / "one.gguf", {"w": (kind, (6, 512), data)}))
    stand_in = file.tensors["w"]
    for rows, expected in (
        (stand_in, values),
        (stand_in.chunk(3)[1], values[2:4]),
        (torch.cat(stand_in.split([1, 5])[::-1]), values.roll(-1, 0)),
    ):
        fmt = file.format(rows.pieces)
        assert torch.equal(fmt.dequantize(file.store(rows.pieces, 512), 512, torch.float64), expected)


def flux_dense(name: str = "flux") -> nn.Module:
    return tiny_models.make(name)


def reference(model: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The dense model with tensors in its authors' layout."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    model = model.double()
    model.load_state_dict(convert_flux_transformer_checkpoint_to_diffusers(dict(tensors)))
    return model


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    flux_dense().save_pretrained(folder)
    return folder


def original_gguf(path: Path, kinds: list[str]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Flux in its authors' layout, its matrices in the formats of ``kinds`` by turns; and what its tensors mean, in float64."""
    stored, dense = {}, {}
    for i, (name, tensor) in enumerate(original_layout(flux_dense().state_dict()).items()):
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = kinds[i % len(kinds)]
            data, dense[name] = random_blocks(kind, *tensor.shape, seed=i)
            stored[name] = (kind, tuple(tensor.shape), data)
        else:
            kind, dtype = (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16))[i % 3]
            value = tensor.to(dtype)
            dense[name] = value.double()
            stored[name] = (kind, tuple(tensor.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    return write_gguf(path, stored), dense


def assert_same_weights(folder: Path, expected: nn.Module) -> None:
    model = type(expected).from_pretrained(folder, dtype=torch.float64)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
    assert len(packed) > 15
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            assert torch.equal(module.dequantize(torch.float64), expected.get_submodule(name).weight), name
    assert float((tiny_models.run(model, "flux") - tiny_models.run(expected, "flux")).abs().max()) < 1e-9


def test_a_gguf_file_in_its_authors_layout_becomes_a_diffusers_folder(config_folder, tmp_path, monkeypatch):
    narrow_converter(monkeypatch)
    file, dense = original_gguf(tmp_path / "flux.gguf", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_1", "Q5_0"])
    convert_gguf(file, tmp_path / "out", config=config_folder)
    assert_same_weights(tmp_path / "out", reference(flux_dense(), dense))


def test_gguf_files_that_cannot_be_read_are_refused_by_name(config_folder, tmp_path, monkeypatch):
    narrow_converter(monkeypatch)
    file, _ = original_gguf(tmp_path / "flux.gguf", ["Q4_0"])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-64])
    data, _ = random_blocks("Q4_0", 2, 64)
    cases = {
        "is truncated: tensor": cut,
        "is Q2_K, which cannot be stored exactly": write_gguf(tmp_path / "q2.gguf", {"w": ("Q2_K", (2, 256), data)}),
        "of GGUF version 1": write_gguf(tmp_path / "v1.gguf", {}, version=1),
        "no multiple of the 32": write_gguf(tmp_path / "odd.gguf", {"w": ("Q4_0", (2, 48), data)}),
        "does not hold the tensors of a FluxTransformer2DModel": write_gguf(
            tmp_path / "other.gguf", {"w": ("Q4_0", (2, 64), data)}
        ),
    }
    (tmp_path / "text.gguf").write_text("not one")
    cases["is not a GGUF file"] = tmp_path / "text.gguf"
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(path, tmp_path / "out", config=config_folder)
    with pytest.raises(ConfigError, match="--config"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bfl_file(path: Path, nvfp4: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Flux as Black Forest Labs quantize it, by diffusers' own reading of the format; and what its tensors mean."""
    stored, dense = {}, {}
    for name, tensor in original_layout(flux_dense().state_dict()).items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and tensor.shape[1] % 16 == 0 and "block" in name:
            if nvfp4:
                codes, scales, second = quantize_nvfp4(tensor)
                stored |= {name: codes, f"{layer}.weight_scale": scales, f"{layer}.weight_scale_2": second}
                stored[f"{layer}.input_scale"] = torch.tensor(0.01)

                dense[name] = exact_nvfp4(codes, scales, second)
            else:
                codes, scales = quantize_fp8r(tensor)
                stored |= {name: codes, f"{layer}.weight_scale": scales}
                assert torch.allclose(dequantize_fp8r(codes, scales), codes.float() * scales[:, None])
                dense[name] = codes.double() * scales.double()[:, None]
        else:
            stored[name] = tensor.bfloat16()
            dense[name] = stored[name].double()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    return path, dense


def exact_nvfp4(codes: torch.Tensor, scales: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The same as diffusers' decoder, in float64."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]).double()
    values = table[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    exact = values * (scales.double() * second.double()).repeat_interleave(16, 1)
    assert torch.allclose(exact.float(), dequantize_nvfp4(codes, scales, second), rtol=1e-6)
    return exact


@pytest.mark.parametrize("nvfp4", [False, True], ids=["fp8", "nvfp4"])
def test_bfl_files_become_a_diffusers_folder(nvfp4, config_folder, tmp_path, monkeypatch):
    narrow_converter(monkeypatch)
    file, dense = bfl_file(tmp_path / "flux.safetensors", nvfp4)
    convert_bfl(file, tmp_path / "out", config=config_folder)
    assert_same_weights(tmp_path / "out", reference(flux_dense(), dense))


def test_bfl_files_that_cannot_be_read_are_refused_by_name(config_folder, tmp_path, monkeypatch):
    narrow_converter(monkeypatch)
    file, _ = bfl_file(tmp_path / "flux.safetensors", nvfp4=False)
    from safetensors.torch import load_file

    scale, weight = "double_blocks.0.img_attn.qkv.weight_scale", "double_blocks.0.img_attn.qkv.weight"
    nan = load_file(file)[weight].view(torch.int8).clone()
    nan[0, 0] = 127
    changes = {
        f"there is no {scale}": lambda t: t.pop(scale),
        f"{scale} is torch.float32 .* does not fit": lambda t: t.update({scale: torch.ones(5)}),
        f"{weight} is torch.float16": lambda t: t.update({weight: t[weight].half()}),
        f"lacks {weight}": lambda t: t.pop(weight),
        "no ....weight_scale": lambda t: [t.pop(key) for key in list(t) if key.endswith("_scale")],
        f"{weight} holds NaN": lambda t: t.update({weight: nan.view(torch.float8_e4m3fn)}),
    }
    for message, change in changes.items():
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=message):
            convert_bfl(tmp_path / "bad.safetensors", tmp_path / "out", config=config_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("described", [True, False])
def test_comfyui_names_e4m3_files_differently(named, described, config_folder, tmp_path, monkeypatch):
    """The same numbers as Black Forest Labs' names give, exactly."""
    narrow_converter(monkeypatch)
    dense = original_layout(flux_dense().state_dict())
    stored, comfy = dict(dense), {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name in [name for name in dense if name.endswith("weight") and dense[name].ndim == 2]:
        layer = name.removesuffix(".weight")
        scale = dense[name].abs().max() / 448
        stored |= {name: (dense[name] / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale}
        comfy |= {
            f"{layer}.{named}": scale,
            f"{layer}.{'scale_input' if named == 'scale_weight' else 'input_scale'}": torch.ones(()),
        }
        if described:
            comfy[f"{layer}.comfy_quant"] = description({"format": "float8_e4m3fn"})
    save_file(stored, tmp_path / "bfl.safetensors")
    save_file({key: t for key, t in stored.items() if not key.endswith("weight_scale")} | comfy, tmp_path / "comfy.safetensors")
    folders = [convert_bfl(tmp_path / f"{name}.safetensors", tmp_path / name, config=config_folder) for name in ("bfl", "comfy")]
    left, right = (type(flux_dense()).from_pretrained(folder).state_dict() for folder in folders)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_comfyuis_other_formats_are_refused_by_name(config_folder, tmp_path):
    tensors = {
        "a.weight": torch.ones(32, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(32, 2).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.ones(()),
        "a.comfy_quant": description({"format": "nvfp4"}),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="ComfyUI's format nvfp4"):
        convert_bfl(tmp_path / "file.safetensors", tmp_path / "out", config=config_folder)
