"""Causal attention, forward and backward: which of torch's kernels is taken, and how fast each of them is.

python -m benchmarks.gpu.attention
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from typing import Any

import torch
from benchmarks.gpu.training import synchronized
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Batch, heads, sequence, width of a head: those of the models of `benchmarks.gpu.training`, and a wider head.
SHAPES = [(4, 32, 4096, 64), (8, 16, 2048, 64), (2, 16, 512, 64), (4, 16, 4096, 128)]
CALLS = 10
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure(shape: tuple[int, int, int, int], way: Any) -> dict[str, Any]:
    """Milliseconds, and billions of operations a second, of forward and backward."""
    batch, heads, length, width = shape
    # As models make them: heads are a view of the width of the hidden state.
    tensors = [torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    query, key, value, gradient = (one.transpose(1, 2) for one in tensors)
    for one in (query, key, value):
        one.requires_grad_()

    def once() -> None:
        query.grad = key.grad = value.grad = None
        out: Tensor = way(query, key, value)
        out.backward(gradient)  # type: ignore[no-untyped-call]

    def several() -> None:
        for _ in range(CALLS):
            once()

    several()
    milliseconds = statistics.median(synchronized(several) for _ in range(5)) / CALLS * 1000
    operations = 7 * batch * heads * length * length * width
    return {"ms": milliseconds, "tflops": operations / milliseconds / 1e9}


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention."""
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def main() -> None:
    """Measure, and print JSON in the last line."""
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    ways: dict[str, Any] = {"as torch chooses": by_torch}
    for name, backend in BACKENDS.items():
        ways[name] = sdpa_kernel(backend)(by_torch)
    try:
        flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func

        def by_fa4(query: Tensor, key: Tensor, value: Tensor) -> Any:
            found = flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
            return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

        ways["flash-attn 4"] = by_fa4
    except Exception as error:
        print(f"flash-attn 4: {type(error).__name__}: {error}", flush=True)
    rows = []
    for shape in SHAPES:
        for name, way in ways.items():
            try:
                found = measure(shape, way)
            except Exception as error:
                print(f"{shape}, {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
                continue
            rows.append({"shape": shape, "way": name, **found})
            print(f"{shape}, {name}: {found['ms']:.3f} ms, {found['tflops']:.0f} TFLOP/s", flush=True)
    print(json.dumps({"name": "attention", "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
