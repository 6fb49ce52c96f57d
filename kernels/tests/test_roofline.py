"""The static roofline: what it counts, what it records, what it predicts, and that nothing gets past a budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from roofline import budgets, devices, model, sass
from roofline.compiled import Machine

from qdiff_diffusers.bench.defaults import default_layers
from qdiff_diffusers.methods import METHODS

H200 = devices.DEVICES["9.0"]
LISTING = """
.L_x_0:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   LDS.U8 R8, [R0] ;
        /*0030*/              @!P0 LDG.E.U8 R9, [R2.64+0x10] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R0], [R2.64] ;
        /*0050*/                   I2F.S8 R8, R8 ;
        /*0060*/                   PRMT R9, R9, 0x8880, RZ ;
        /*0070*/                   IMAD.SHL.U32 R9, R9, 0x4, RZ ;
        /*0080*/                   IMAD.WIDE R2, R3, 0x8, R2 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   LDL.64 R8, [R1] ;
        /*00c0*/               @P1 BRA `(.L_x_1) ;
        /*00d0*/                   STG.E [R2.64], R24 ;
        /*00e0*/                   EXIT ;
.L_x_2:
        /*00f0*/                   BRA `(.L_x_2);
"""


def test_the_loop_with_the_products_is_found_and_its_instructions_are_told_apart():
    code = sass.parse(LISTING)
    first, last = sass.main_loop(code)
    counts = sass.count(code.instructions[first : last + 1])
    assert counts.all == 11
    assert counts.matrix == {"bits16": 1}
    assert (counts.loads, counts.copies, counts.shared_loads) == ({"8": 1}, {"128": 1}, {"8": 1})
    assert (counts.decode, counts.conversions, counts.slow_conversions, counts.address) == (2, 1, 1, 1)
    assert (counts.barriers, counts.spilled) == (1, 8)


def test_the_endless_loop_behind_a_kernel_is_no_loop_of_it():
    assert len(sass.parse(LISTING).loops) == 1


def test_waiting_for_a_barrier_out_of_line_makes_no_loop():
    wait = "        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1 ;\n"
    back = "        /*0110*/              @!P0 BRA `(.L_x_0);\n"
    assert sass.parse(LISTING + ".L_x_3:\n" + wait + back).loops == sass.parse(LISTING).loops


def test_every_default_of_every_method_is_in_the_table():
    found = {layer.spec.format for layer in default_layers()}
    for name, method in METHODS.items():
        for bits in (None, *method.config.bit_choices):
            config = method.config(bits=bits)
            for weight_format, _ in method.layouts(config, (3072, 3072)):
                assert weight_format in found, f"{name} {bits}"
    assert {name for name, method in METHODS.items()} == {layer.name.split()[0] for layer in default_layers() if layer.headline}


def test_layers_of_one_name_are_one_layer():
    names = [layer.name for layer in default_layers()]
    assert len(names) == len(set(names))


def machine(sass_text: str = LISTING, registers: int = 128, shared: int = 32768) -> Machine:
    return Machine(registers, shared, 0, 8, sass_text)


def test_ctas_share_a_multiprocessors_registers_and_shared_memory():
    assert model.ctas_per_multiprocessor(machine(registers=128), H200) == 2
    assert model.ctas_per_multiprocessor(machine(registers=32), H200) == 6  # by shared memory
    assert model.ctas_per_multiprocessor(machine(registers=32, shared=0), H200) == 8  # by warps
    assert model.ctas_per_multiprocessor(machine(shared=300_000), H200) == 0


ROW = {"target": "9.0", "layer": "fp 4", "stored": "e1m2uz/e2m1uz g16", "activations": "none", "rows": 3072, "columns": 3072}
ROW |= {"tokens": 256, "steps": [["linear", 10.0, "issue", 48, "abc"]]}
FACTS = {"abc": {"spilled": 0, "tile": [128, 128, 64], "issue_over_matrix": 3.0, "decode_per_weight": 9.0, "narrow_loads": 32}}


def test_a_missed_goal_has_todays_number_as_its_ceiling_which_only_goes_down():
    none = {"triton": None, "rows": {}}
    first = budgets.updated(budgets.findings([ROW], FACTS), none, "3.9.0")
    (ceilings,) = first["rows"].values()
    assert ceilings == {"spilled": 0, "issue_over_matrix": 3.0, "decode_per_weight": 9.0, "narrow_loads": 32}
    assert not budgets.violations(budgets.findings([ROW], FACTS), first, "3.9.0")
    better = {"abc": FACTS["abc"] | {"issue_over_matrix": 1.1, "decode_per_weight": 3.0}}
    (lower,) = budgets.updated(budgets.findings([ROW], better), first, "3.9.0")["rows"].values()
    assert (lower["issue_over_matrix"], lower["decode_per_weight"]) == (1.2, 4.0)  # the goals, not less
    worse = {"abc": FACTS["abc"] | {"spilled": 4}}
    assert "4 bytes of spilled registers, the budget is 0" in budgets.violations(budgets.findings([ROW], worse), first, "3.9.0")[0]
    with pytest.raises(ValueError, match="only go down"):
        budgets.updated(budgets.findings([ROW], worse), first, "3.9.0")
    assert budgets.updated(budgets.findings([ROW], worse), first, "3.9.0", accept_worse=True)


def test_a_kernel_without_a_budget_is_named_and_another_triton_is_held_to_spills_only():
    none = {"triton": "3.9.0", "rows": {}}
    assert "no budget for spilled" in budgets.violations(budgets.findings([ROW], FACTS), none, "3.9.0")[0]
    held = budgets.updated(budgets.findings([ROW], FACTS), none, "3.9.0")
    worse = {"abc": FACTS["abc"] | {"spilled": 4, "narrow_loads": 99}}
    assert len(budgets.violations(budgets.findings([ROW], worse), held, "4.0.0")) == 1


@pytest.mark.parametrize(
    ("stored", "activations", "goal"),
    [
        ("int4 g64", "int8", 2.0),
        ("e2m1 g16 e4m3 scales", "none", 2.0),
        ("int8 asymmetric per row", "int8", 0.5),
        ("e4m3 per row float16 scales", "fp8", 0.5),
        ("e4m3 per row float16 scales", "none", 4.0),
        ("4x8 d16 shared per row", "int8", 4.0),
    ],
)
def test_how_much_decoding_a_weight_may_take_depends_on_how_it_is_stored(stored, activations, goal):
    assert budgets.decode_goal(ROW | {"stored": stored, "activations": activations}, {}) == goal


def test_the_committed_budgets_can_be_read_and_none_allows_less_than_its_goal():
    held = budgets.load()
    assert held["rows"]
    for ceilings in held["rows"].values():
        for metric, ceiling in ceilings.items():
            assert metric in budgets.UNITS
            assert ceiling >= min(budgets.GOALS[metric], budgets.READY)


def test_what_it_records_and_compiles():
    """In a process of its own, because this one may run kernels under the interpreter; recorded_roofline.py has the tests."""
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", here / "recorded_roofline.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parents[1])
    assert run.returncode == 0, run.stdout[-3000:]
