"""A model larger than the GPU memory it may use: seconds to load and tokens/s, beside Accelerate where it is installed.

    python -m benchmarks.gpu.placement

A Llama of random weights is written as safetensors into a temporary folder, and loaded with a limit of GPU memory; the
rest is offloaded to host memory, or to disk. Both sides run in this process, one after the other, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GIB = 2**30
SIDES = ("accelerate", "paceline")


def main() -> int:
    """Build the model, measure every case on both sides, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of GPU memory for weights")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150.0, help="no measurement begins after these")
    parser.add_argument("--cases", nargs="*", default=["cpu", "disk"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    end = time.monotonic() + args.seconds
    sides = [side for side in SIDES if side == "paceline" or importlib.util.find_spec("accelerate")]
    with tempfile.TemporaryDirectory(prefix="placement-") as text:
        folder = Path(text)
        config = write_model(folder / "model", args.layers, args.width)
        print(describe(folder / "model"), flush=True)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for repeat in range(args.repeats):
            for case in args.cases:
                # In turns, so that neither side is always first.
                for side in sides if repeat % 2 == 0 else sides[::-1]:
                    if time.monotonic() > end:
                        print(f"{case}, {side}: no time is left", flush=True)
                        continue
                    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                        answer = measure(side, case, folder, config, args)
                    found.setdefault((case, side), []).append(answer)
                    print(case, side, {k: v for k, v in answer.items() if k != "ids"}, flush=True)
    print_table(found, args.cases, sides)
    same = all_equal(found, args.cases)
    print("Both sides generate the same tokens." if same else "THE SIDES GENERATE DIFFERENT TOKENS.")
    return 0 if same else 1


def write_model(folder: Path, layers: int, width: int) -> Any:
    """Write a Llama of random weights, and return its configuration."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(width // 512, 1), max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in make_model(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index, part, size, weights = {}, 0, 0, {}
    for name, shape in shapes.items():
        random = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        weights[name] = (torch.ones_like(random) if "norm" in name else random * 0.02).cpu()
        index[name] = f"part{part}.safetensors"
        size += weights[name].nbytes
        if size > GIB or name == list(shapes)[-1]:
            save_file(weights, folder / f"part{part}.safetensors", metadata={"format": "pt"})
            part, size, weights = part + 1, 0, {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return config


def make_model(config: Any) -> Any:
    """Build the model in bf16, where torch's current device is."""
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: Any = LlamaForCausalLM(config)
        return model.eval()
    finally:
        torch.set_default_dtype(before)


def describe(folder: Path) -> str:
    """The hardware, the versions, the model, and how fast a pinned copy is: nothing streams faster than that."""
    import transformers

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    name, rate = "cpu", ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        rate = f", pinned copy {1 / seconds:.1f} GiB/s"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {size / GIB:.2f} GiB{rate}"


def library(side: str) -> Any:
    """The module with the functions of a side."""
    if side == "accelerate":
        import accelerate

        return accelerate
    from paceline import placement

    return placement


def measure(side: str, case: str, folder: Path, config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Load the model, and generate from it."""
    on_gpu = torch.cuda.is_available()
    offload = folder / "offload"
    shutil.rmtree(offload, ignore_errors=True)
    functions = library(side)
    clear()
    limit = int(args.limit * GIB)
    memory: dict[Any, int] = {0: limit, "cpu": 100 * GIB if case == "cpu" else 0} if on_gpu else {"cpu": limit}
    start = time.perf_counter()
    with functions.init_empty_weights():
        model = make_model(config)
    device_map = functions.infer_auto_device_map(model, memory, no_split_module_classes=["LlamaDecoderLayer"])
    built = time.perf_counter()
    functions.load_checkpoint_and_dispatch(model, folder / "model", device_map, offload_folder=offload)
    synchronize()
    loaded = time.perf_counter()
    ids = torch.arange(1, 33, device="cuda" if on_gpu else "cpu").view(1, -1)
    step_ends = []
    with torch.no_grad():
        cache = None
        tokens, step = [], ids
        for _ in range(args.tokens):
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            step = output.logits[:, -1:].argmax(-1).to(ids.device)
            tokens.append(int(step))
            step_ends.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(step_ends)]
    answer = {
        "build_s": round(built - start, 2),
        "load_s": round(loaded - built, 2),
        "first_token_s": round(step_ends[0] - loaded, 2),
        "tokens_per_s": round(len(steps) / sum(steps), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if on_gpu else 0.0,
        "offloaded": sum(device in ("cpu", "disk") for device in device_map.values()),
        "ids": tokens,
    }
    del model, cache, output
    clear()
    return answer


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    """Give memory back, and count its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def print_table(found: dict[tuple[str, str], list[dict[str, Any]]], cases: list[str], sides: list[str]) -> None:
    """Print the best of each case, and the ratios."""
    print("\n| offloaded to | | load, s | first token, s | tokens/s | peak, GiB |\n|---|---|--:|--:|--:|--:|")
    for case in cases:
        best = {side: summary(found[case, side]) for side in sides if (case, side) in found}
        for side, (load, first, rate, peak) in best.items():
            print(f"| {case} | {side} | {load:.2f} | {first:.2f} | {rate:.2f} | {peak:.2f} |")
        if len(best) == len(SIDES):
            (load, first, rate, _), (our_load, our_first, our_rate, _) = (best[side] for side in SIDES)
            ratios = f"{load / our_load:.2f} x | {first / our_first:.2f} x | {our_rate / rate:.2f} x"
            print(f"| {case} | paceline is faster by | {ratios} | |")


def summary(answers: list[dict[str, Any]]) -> tuple[float, float, float, float]:
    """The best load, first token and rate, and the largest peak."""
    return (
        min(answer["load_s"] for answer in answers),
        min(answer["first_token_s"] for answer in answers),
        max(answer["tokens_per_s"] for answer in answers),
        max(answer["peak_gib"] for answer in answers),
    )


def all_equal(found: dict[tuple[str, str], list[dict[str, Any]]], cases: list[str]) -> bool:
    """Whether all sides generated the same tokens in each case."""
    for case in cases:
        tokens = [answer["ids"] for (each, _), answers in found.items() if each == case for answer in answers]
        if any(other != tokens[0] for other in tokens):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
