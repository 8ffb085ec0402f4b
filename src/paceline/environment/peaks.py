"""Peak FLOPS of devices from the vendors' data sheets: the denominator of MFU."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Peak", "peak_flops", "peak_of"]


class Peak(NamedTuple):
    """Dense matrix-product throughput in TFLOPS.

    Attributes:
        half: In bf16 or fp16.
        tf32: In fp32 with TF32 allowed.
        full: In fp32.
    """

    half: float
    tf32: float
    full: float


# The first name that a device's name contains counts, so that longer names come first.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    ("GB200", Peak(2500, 1250, 80)),
    ("B200", Peak(2250, 1125, 75)),
    ("GH200", Peak(989.4, 494.7, 66.9)),
    ("H200", Peak(989.4, 494.7, 66.9)),
    ("H100 NVL", Peak(835.5, 417.5, 60)),
    ("H100 PCIe", Peak(756, 378, 51)),
    ("H100", Peak(989.4, 494.7, 66.9)),
    ("A100", Peak(312, 156, 19.5)),
    ("A10G", Peak(70, 35, 35)),
    ("A10", Peak(125, 62.5, 31.2)),
    ("A40", Peak(149.7, 74.8, 37.4)),
    ("RTX A6000", Peak(154.8, 77.4, 38.7)),
    ("L40S", Peak(362, 183, 91.6)),
    ("L40", Peak(181, 90.5, 90.5)),
    ("L4", Peak(121, 60, 30.3)),
    ("RTX 4090", Peak(165.2, 82.6, 82.6)),
    ("RTX 3090", Peak(71, 35.6, 35.6)),
    ("V100", Peak(125, 15.7, 15.7)),
    ("T4", Peak(65, 8.1, 8.1)),
    ("MI300X", Peak(1307.4, 653.7, 163.4)),
    ("MI250X", Peak(191.5, 47.9, 47.9)),
)


def peak_of(name: str) -> Peak | None:
    """Return the peak of a device by name; None if it is not in the table.

    >>> peak_of("NVIDIA H100 80GB HBM3").half
    989.4
    """
    return next((peak for known, peak in _PEAKS if known.casefold() in name.casefold()), None)


def peak_flops(device: torch.device, mode: str) -> float | None:
    """Return the peak operations per second of a device in this precision; None if unknown.

    Args:
        device: The device.
        mode: `no`, `bf16`, `fp16` or `fp8`, whose MFU is by convention that of bf16.
    """
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    if mode in ("bf16", "fp16", "fp8"):
        return peak.half * 1e12
    is_fast = torch.get_float32_matmul_precision() != "highest"
    return (peak.tf32 if is_fast else peak.full) * 1e12
