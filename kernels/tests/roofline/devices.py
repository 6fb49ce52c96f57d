"""What the model assumes of one GPU of each architecture: data sheets, except where a comment says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

REACHED = 0.8  # of a data sheet's matrix rate by the vendor's best product (H200: 790 of 989 TFLOP/s)
READ = 0.9  # of a data sheet's memory bandwidth by a kernel that only reads
L2_BYTES = 32  # per multiprocessor and cycle: between the 24 and 40 that public measurements of random and of streamed reads show
SECTOR = 32  # bytes of L2 that a look-up moves however few it wants
L2_RANDOM_BYTES = 24  # per multiprocessor and cycle, of random sectors
LAUNCH = 2.0e-6  # seconds for which a kernel keeps the device beside its work: its start, its last wave's end. An estimate.
LATENCY = 1000  # cycles from the request of a tile to its use, under load. An estimate.


class Rates(NamedTuple):
    """Multiply-adds per multiprocessor and cycle, by operand type; 0 where the matrix unit lacks it."""

    bits16: int
    int8: int
    fp8: int


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        clock: Hz that it holds under load.
        bandwidth: bytes per second of its memory.
        shared: bytes of shared memory that one CTA may have; a multiprocessor has one kilobyte more for each CTA.
        asynchronous: whether products run beside the warps that issued them (wgmma, tcgen05) rather than in them (mma.sync).
        row_scales: whether the vendor's FP8 product takes a scale per row (pytorch 192707: not on 12.0).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    rates: Rates
    bandwidth: float
    shared: int
    warps: int
    ctas: int
    asynchronous: bool
    row_scales: bool

    @property
    def target(self) -> str:
        """The key of compile_kernels.TARGETS."""
        return "cuda:{}{}".format(*self.capability)

    @property
    def version(self) -> str:
        return "{}.{}".format(*self.capability)


DEVICES = {
    device.version: device
    for device in (
        Device("A100 SXM 80 GB", (8, 0), 108, 1.41e9, Rates(1024, 2048, 0), 2.04e12, 163 << 10, 64, 32, False, False),
        Device("RTX 4090", (8, 9), 128, 2.52e9, Rates(256, 1024, 512), 1.01e12, 99 << 10, 48, 24, False, False),
        Device("H200 SXM", (9, 0), 132, 1.75e9, Rates(2048, 4096, 4096), 4.8e12, 227 << 10, 64, 32, True, True),
        Device("B200", (10, 0), 148, 1.85e9, Rates(4096, 8192, 8192), 8.0e12, 227 << 10, 64, 32, True, True),
        Device("RTX 5090", (12, 0), 170, 2.41e9, Rates(256, 1024, 512), 1.79e12, 99 << 10, 48, 24, False, False),
    )
}
