"""What the roofline records and compiles, in a process without Triton's interpreter: test_roofline.py runs this file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qdiff_kernels.gpu import ops
from roofline import cases, devices, model, record
from roofline.compiled import Failure, Library, Machine

from qdiff_diffusers.bench.defaults import default_layers

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


def case(name: str, activations: str, tokens: int, shape: tuple[int, int] = (3072, 3072)) -> cases.Case:
    layer = next(layer for layer in default_layers() if layer.name == name)
    return cases.Case(layer, activations, shape, tokens)


def steps(name: str, activations: str, tokens: int, device: devices.Device = H200) -> list[str]:
    return [step.name for step in record.record(device, case(name, activations, tokens).prepare).steps]


@pytest.mark.parametrize("name", ["aq 2", "vq 2", "fp 4", "rtn 8", "svdquant 4 g32 r24"])
def test_what_surrounds_a_product_is_recorded_too(name):
    """Kernels of ours and of the vendor, on a device that is not there."""
    large = steps(name, "none", 4096)
    assert large[-1] in ("mm", "addmm", "linear")
    assert ("prepare" in large) == name.startswith(("aq", "vq"))  # their inputs are rotated
    assert "prepare" in steps(name, "int8", 16)


def test_the_devices_of_the_table_are_told_apart_and_forgotten_again():
    ada, hopper = devices.DEVICES["8.9"], devices.DEVICES["9.0"]
    assert "_scaled_mm" in steps("fp e4m3 row", "fp8", 4096, hopper)
    assert "_scaled_mm" not in steps("fp e4m3 row", "fp8", 4096, ada)
    assert not torch.cuda.is_available() or torch.cuda.get_device_properties(0).name != hopper.name
    assert ops.matrix_units(torch.device("cpu")).bf16


def test_a_kernel_that_does_not_fit_is_recorded_with_the_smaller_tiles_that_replace_it():
    chosen = case("fp 4", "none", 16)
    first = record.record(H200, chosen.prepare).steps[0]
    refused = record.record(H200, chosen.prepare, lambda kernel: "shared memory" if kernel == first.specialisation else None)
    assert refused.steps[0].specialisation != first.specialisation
    assert refused.steps[0].sizes["num_stages"] < first.sizes["num_stages"]


def test_what_a_tensor_holds_is_read_as_zeros_and_counted():
    def prepare(make):
        table = make((4, 4), torch.float32)
        return lambda: (float(table.abs().amax()), bool((table > 1).any()), table.sum().item())

    assert record.record(H200, prepare).waits == 3


def test_tensors_of_the_host_can_be_moved_to_the_device_and_written_into_its_tensors():
    def prepare(make):
        wide, narrow = make((4, 8), torch.float32), make((4, 2), torch.float32)

        def call():
            signs = torch.ones(8).to("cuda:0", torch.bfloat16)
            wide[:, 6:] = narrow
            wide[0] = 1.0
            return wide * signs

        return call

    found = [step.name for step in record.record(H200, prepare).steps]
    assert found == ["_to_copy", "copy_", "fill_", "mul"]


def kernel(**sizes: int) -> record.Kernel:
    chosen = case("fp 4", "none", 256)
    found = record.record(H200, chosen.prepare).steps[0]
    return found._replace(sizes=found.sizes | sizes)


def test_more_instructions_take_longer_and_memory_is_the_floor():
    launch = kernel()
    unpack = "        /*0060*/                   PRMT R9, R9, 0x8880, RZ ;\n"
    longer = LISTING.replace(unpack, unpack * 900)
    short, long = (model.predict_kernel(launch, Machine(128, 32768, 0, 8, text), H200) for text in (LISTING, longer))
    assert long.seconds > 1.5 * short.seconds
    assert long.limit == "issue"
    heavy = model.predict_kernel(launch._replace(bytes=48 << 30), Machine(128, 32768, 0, 8, LISTING), H200)
    assert heavy.limit == "memory"
    assert heavy.seconds == pytest.approx((48 << 30) / (0.9 * 4.8e12), rel=0.01)


def test_an_operand_that_was_decoded_before_is_loaded_as_the_bytes_it_has_become():
    dense = [step for step in record.record(H200, case("aq 2", "int8", 4096).prepare).steps if step.name == "linear"]
    coded = [step for step in record.record(H200, case("aq 2", "int8", 16).prepare).steps if step.name == "linear"]
    assert (model._weight_bits(dense[0]), model._weight_bits(coded[0])) == (8.0, 2.0)


def test_the_vendors_product_is_at_its_share_of_the_peak_and_never_below_its_bytes():
    dense = case("fp 4", "none", 4096, (12288, 3072)).dense
    assert dense.product == (4096, 12288, 3072)
    flops = 2 * 4096 * 12288 * 3072
    peak = 2 * 2048 * 132 * 1.75e9
    assert 0.6 < flops / peak / model.predict_vendor(dense, H200).seconds < devices.REACHED
    one = case("fp 4", "none", 1, (12288, 3072)).dense
    assert model.predict_vendor(one, H200).limit == "memory"


def test_a_kernel_that_does_not_compile_is_kept_as_a_failure(tmp_path: Path):
    wanted = kernel().specialisation
    broken = wanted._replace(options=wanted.options | {"num_warps": 3})
    library = Library(tmp_path, workers=1)
    for _ in range(2):  # the second time out of the folder
        with pytest.raises(Failure):
            library.get(broken, H200.target)
        library = Library(tmp_path, workers=1)
