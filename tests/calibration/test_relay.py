"""Statistics in several passes: each block of a chain runs about once, others run wholly, and the bits are those of one pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from calibration.test_calibrate import FEW, assert_equal, dit, tensors, unet
from torch import Tensor, nn

from qdiff_diffusers import RTNConfig, quantize
from qdiff_diffusers.calibration import layerwise
from qdiff_diffusers.calibration.blocks import block_names
from qdiff_diffusers.calibration.relay import Relay
from qdiff_diffusers.calibration.statistics import collect
from qdiff_diffusers.calibration.store import Store


def stored(inputs: list[dict]) -> Store:
    calls = Store(Path("unused"), 1 << 30)
    for value in inputs:
        calls.append({"inputs": value})
    return calls


def runs_of(model: nn.Module) -> dict[str, int]:
    """How often each block's layers have run; a block that is stood in for does not run its layers."""
    runs: dict[str, int] = dict.fromkeys(block_names(model), 0)
    embeddings = set(model.transformer_blocks[0].norm1.emb.modules())  # DiT uses them outside of the block, too

    def count(name: str) -> None:
        runs[name] += 1

    for name in runs:
        first = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear) and m not in embeddings)
        first.register_forward_pre_hook(lambda *_, name=name: count(name))
    return runs


def in_groups(model: nn.Module, calls: Store, size: int, folder: Path, memory_limit: int = 1 << 30) -> tuple[dict, Relay]:
    """Statistics of all linear layers, so many in a pass, by a relay."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    relay = Relay(model, calls, folder / "relay", memory_limit)
    found = {}
    for start in range(0, len(names), size):
        group = names[start : start + size]
        found |= collect(model, group, calls, 8, relay=relay, following=names[start + size :])
    return found, relay


def assert_as_in_one_pass(model: nn.Module, calls: Store, found: dict) -> None:
    for name, expected in collect(model, list(found), calls, 8).items():
        assert found[name].tokens == expected.tokens, name
        if expected.tokens:
            assert torch.equal(found[name].hessian, expected.hessian), name
        assert all(torch.equal(found[name].rows[step], rows) for step, rows in expected.rows.items()), name


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
@pytest.mark.parametrize("size", [2, 3, 7, 100])
@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "pixart", "wan", "sdxl_unet"])
def test_passes_in_a_relay_see_what_one_pass_sees(name, size, memory_limit, tmp_path):
    model = tiny_models.make(name)
    calls = stored([tiny_models.MODELS[name][1]() for _ in range(3)])
    found, _ = in_groups(model, calls, size, tmp_path, memory_limit)
    assert_as_in_one_pass(model, calls, found)
    assert not any("forward" in vars(module) for module in model.modules())


def four_blocks() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def test_each_block_of_a_chain_runs_about_once(tmp_path):
    model, calls = four_blocks(), stored([tiny_models.dit_inputs() for _ in range(3)])
    runs = runs_of(model)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    inside = [n for n in names if n.startswith("transformer_blocks") and ".emb." not in n]
    relay = Relay(model, calls, tmp_path / "relay", 1 << 30)
    assert relay.blocks == [f"transformer_blocks.{i}" for i in range(4)]
    runs.update(dict.fromkeys(runs, 0))  # the first call, by which the chain was known
    for block in range(4):
        own = [n for n in inside if n.startswith(f"transformer_blocks.{block}.")]
        collect(model, own, calls, relay=relay, following=inside[inside.index(own[-1]) + 1 :])
    assert set(runs.values()) == {len(calls)}
    relay.close()
    assert not (tmp_path / "relay").exists()


class Chain(nn.Module):
    """Four blocks, of which each gets what the one before it gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Again(Chain):
    """A chain whose first block runs once more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](super().forward(x))


class Skip(Chain):
    """A chain whose last block also gets what the first one gave."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[3](self.blocks[2](self.blocks[1](first)) + first)


class Moody(Chain):
    """A chain that leaves out blocks for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = x if number in (0, 2) and len(x) == 3 else block(x)
        return x


class Borrowed(Chain):
    """A chain of which a layer is used outside of its block too, as DiT does with the first block's embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1][0](super().forward(x))


class Hint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        hint.add_(1)
        return self.layer(x) * hint


class Hinting(Chain):
    """A chain whose blocks also tell the next ones something, in a tensor that all of them are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Hint() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hint = torch.zeros(8)
        for block in self.blocks:
            x = block(x, hint=hint)
        return x


class Reversed(Chain):
    """A chain whose blocks run from last to first."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "is_chain"),
    [(Again, False), (Skip, False), (Moody, False), (Hinting, False), (Borrowed, True), (Reversed, True)],
)
def test_what_is_no_chain_is_run_wholly(kind, is_chain, size, tmp_path):
    model, calls = kind(), stored([{"x": torch.randn(rows, 8)} for rows in (5, 3, 4)])
    found, relay = in_groups(model, calls, size, tmp_path)
    assert bool(relay.blocks) == is_chain
    assert_as_in_one_pass(model, calls, found)
    assert not any("forward" in vars(module) for module in model.modules())


def test_hooks_that_move_weights_are_left_to_run_as_they_do(tmp_path):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = four_blocks()
    add_hook_to_module(model.transformer_blocks[1], ModelHook())
    assert not Relay(model, stored([tiny_models.dit_inputs()]), tmp_path / "relay", 1).blocks


@pytest.mark.parametrize("make", [dit, unet], ids=["dit", "unet"])
def test_a_calibration_in_many_passes_ends_with_the_bits_of_one(make):
    settings = FEW if make is dit else {"class_labels": [0, 1], "steps": 3}
    once = quantize(make(), RTNConfig(bits=2), calibration=settings)
    many = quantize(make(), RTNConfig(bits=2), calibration=settings | {"memory_limit": 30_000})
    assert_equal(*(tensors(getattr(found, "transformer", found)) for found in (once, many)))


def test_a_calibration_in_many_passes_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """With what blocks gave lost, it begins at the first block again, to the same bits."""
    settings = FEW | {"memory_limit": 30_000}
    once = quantize(dit(), RTNConfig(bits=2), calibration=settings)
    written = layerwise._write
    finished: list[str] = []

    def write(path: Path, layer: layerwise.FinishedLayer) -> None:
        if len(finished) == 9:
            raise KeyboardInterrupt
        finished.append(path.stem)
        written(path, layer)

    monkeypatch.setattr(layerwise, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        quantize(dit(), RTNConfig(bits=2), tmp_path / "out", calibration=settings)
    monkeypatch.setattr(layerwise, "_write", written)
    pipe = dit()
    quantize(pipe, RTNConfig(bits=2), tmp_path / "out", calibration=settings)
    assert_equal(tensors(once.transformer), tensors(pipe.transformer))
