"""Which implementation runs, and how to force one."""

from __future__ import annotations

import oracle
import pytest
import torch
from qdiff_kernels import _dispatch as dispatch
from qdiff_kernels import implementation, implementations, use

OPS = [f"{kind}_{op}" for kind in ("codebook", "minifloat", "integer") for op in ("dequantize", "linear", "conv2d")]


@pytest.fixture
def doubling_linear(monkeypatch):
    """A stand-in for a faster kernel, registered for the CPU: twice the right answer, so that it shows when it ran."""
    monkeypatch.setitem(dispatch._implementations, "integer_linear", dict(dispatch._implementations["integer_linear"]))
    reference = dispatch._implementations["integer_linear"]["torch"]
    monkeypatch.setitem(
        dispatch._implementations, "integer_conv2d", {"torch": dispatch._implementations["integer_conv2d"]["torch"]}
    )
    implementation("integer_linear", "cpu")(lambda *arguments: 2 * reference(*arguments))


def call(x: torch.Tensor) -> torch.Tensor:
    weight = oracle.packed_weight("int4-g64", 3, 64)
    return oracle.LINEAR["integer"](x, *weight.arguments, *oracle.NO_EXTRAS.values())


def test_every_op_has_an_implementation_for_every_device():
    table = implementations()
    assert set(OPS) <= set(table)
    assert all(set(row) == {"cpu", "cuda", "xpu"} for row in table.values())


def test_a_faster_implementation_is_preferred_where_it_is_registered(doubling_linear):
    x = torch.randn(2, 64)
    fast = call(x)
    with use("torch"):
        assert torch.equal(fast, 2 * call(x))
    assert implementations()["integer_linear"]["cpu"] == "cpu"
    assert implementations()["integer_conv2d"]["cpu"] == "torch"


def test_a_forced_implementation_holds_inside_the_context_only(doubling_linear):
    x = torch.randn(2, 64)
    before = call(x)
    with use("torch"):
        with use(None):
            assert torch.equal(call(x), before)
        assert not torch.equal(call(x), before)
    assert torch.equal(call(x), before)


def test_the_choice_is_restored_after_an_error(doubling_linear):
    with pytest.raises(RuntimeError, match="on purpose"), use("torch"):
        raise RuntimeError("on purpose")
    assert implementations()["integer_linear"]["cpu"] == "cpu"


def test_a_forced_implementation_that_an_op_lacks_is_an_error_by_name():
    with use("warp"), pytest.raises(ValueError, match=r"integer_linear has no implementation 'warp'; it has .*torch"):
        call(torch.randn(2, 64))


def test_an_implementation_that_declines_passes_the_call_on(monkeypatch):
    monkeypatch.setitem(dispatch._implementations, "integer_linear", dict(dispatch._implementations["integer_linear"]))
    implementation("integer_linear", "cpu")(lambda *arguments: NotImplemented)
    x = torch.randn(2, 64)
    with use("torch"):
        expected = call(x)
    assert torch.equal(call(x), expected)
    with use("cpu"), pytest.raises(ValueError, match="integer_linear: the implementation 'cpu' does not take these arguments"):
        call(x)
