"""Whatever a checkpoint claims, it ends in an error that says why: no crash, no hang, no huge allocation, nothing executed."""

from __future__ import annotations

import resource
import time

import fuzzing
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

MEMORY = 512 << 10  # KiB that all examples of a family together may add
SECONDS = 20  # that one may take, on a busy machine


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> fuzzing.Originals:
    with fuzzing.quiet_libraries():
        return fuzzing.Originals(tmp_path_factory.mktemp("fuzz"))


FAMILIES = ("config", "header", "index", "single file", "encoder config", "encoder header", "encoder index")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spoiled_checkpoint_is_refused_or_harmless(family, originals):
    strategy, doors = originals.families()[family]
    outcomes = set()

    @given(strategy)
    @settings(max_examples=40)
    def examples(files):
        folder = originals.write(files)
        for door in doors:
            start = time.perf_counter()
            outcomes.add(fuzzing.knock(door, folder))
            assert time.perf_counter() - start < SECONDS

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with fuzzing.quiet_libraries():
        examples()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    assert "refused by us" in outcomes and outcomes <= set(fuzzing.OUTCOMES)


def test_every_family_is_tried(originals):
    assert set(originals.families()) == set(FAMILIES)


def test_the_originals_are_good(originals):
    model = fuzzing.load_diffusers(originals.write(originals.sharded))
    assert torch.equal(tiny_models.run(model, "dit"), originals.output)
    assert fuzzing.knock("transformers", originals.write(originals.sharded_encoder)) == "loaded"


@given(st.data())
@settings(max_examples=20)
def test_the_fuzzer_sees_what_is_forbidden(data):
    """Otherwise its silence would mean nothing."""
    fuzzing.DOORS["evil"] = lambda folder: __import__("os").system("true")
    with pytest.raises(AssertionError, match=r"os\.system"):
        fuzzing.knock("evil", data.draw(st.none()))
    del fuzzing.DOORS["evil"]
