"""The cost of starting: whole processes, from the command to its exit, as ratios.

    python benchmarks/startup.py

Compares `paceline launch` of a script that prints one line with torchrun, and with `accelerate launch` where that is
installed; then `from paceline import Accelerator` with `import torch` alone; then what importing and building an
`Accelerator` costs over `import torch`: paceline's, and Accelerate's through the switch and by itself. The commands
take turns, so that a busy machine slows all of them. The tables have wall time, and the CPU time of all processes.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

TORCHRUN = "torchrun"
TORCH = "import torch"


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="runs per command (default: 15)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "print.py")
        script.write_text('print("here")\n', encoding="utf-8")
        for count in (1, 2):
            print_table(
                f"launch, {count} process{'es' if count > 1 else ''}",
                measure(launches(str(script), count), rounds),
                TORCHRUN,
            )
    print_table("import", measure(imports(), rounds), TORCH)
    print_costs(measure_over_torch(over_torch(), rounds))


def launches(script: str, count: int) -> dict[str, list[str]]:
    """The commands that run a script on `count` processes."""
    number = str(count)
    ways = {
        TORCHRUN: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number, script],
        "paceline launch": ["-m", "paceline", "launch", "--quiet", "--cpu", "--num_processes", number, script],
    }
    if find_spec("accelerate"):
        ways["accelerate launch"] = [
            *("-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--num_processes", number, script),
        ]
    return ways


def imports() -> dict[str, list[str]]:
    """The commands that import something and exit."""
    ways = {TORCH: "import torch", "and Accelerator": "import torch; from paceline import Accelerator"}
    return {name: ["-c", f"import os; {statement}; os._exit(0)"] for name, statement in ways.items()}


def over_torch() -> dict[str, str]:
    """What a program does after `import torch`."""
    build = "from accelerate import Accelerator; Accelerator(cpu=True)"
    switch = "from paceline.compat import install_as_accelerate; install_as_accelerate()"
    ways = {
        "from paceline import Accelerator": "from paceline import Accelerator",
        "and Accelerator(cpu=True)": "from paceline import Accelerator; Accelerator(cpu=True)",
        "Accelerate's, through the switch": f"{switch}; {build}",
    }
    if find_spec("accelerate"):
        ways["Accelerate's"] = build
    return ways


def measure_over_torch(ways: dict[str, str], rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Return for each way and round its CPU seconds, those of `import torch` before it, and the modules it imports."""
    program = (
        "import os, sys, time; import torch, torch.distributed\n"
        "known = len(sys.modules); torchs = time.process_time()\n"
        "{}\nprint(time.process_time() - torchs, torchs, len(sys.modules) - known, flush=True); os._exit(0)"
    )
    # With bytecode: where Python may not write it, it would compile paceline's sources in every run.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, statement in ways.items():
            command = [sys.executable, "-c", program.format(statement)]
            done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
            seconds, torchs, modules = done.stdout.split()[-3:]
            if number:  # the first round fills the caches
                found[name].append((float(seconds), float(torchs), int(modules)))
    return found


def print_costs(found: dict[str, list[tuple[float, float, int]]]) -> None:
    """Print the least and the median CPU time of each way, and its share of that of `import torch`."""
    print("\n| over import torch | least CPU s | median | of import torch | modules |\n|---|--:|--:|--:|--:|")
    for name, rounds in found.items():
        seconds = [one[0] for one in rounds]
        share = statistics.median(one[0] / one[1] for one in rounds)
        print(f"| {name} | {min(seconds):.3f} | {statistics.median(seconds):.3f} | {share:.3f} | {rounds[0][2]} |")


def measure(ways: dict[str, list[str]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the wall and CPU seconds of each command in each round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, arguments in ways.items():
            took = seconds_of(arguments)
            if number:  # the first round fills the caches
                times[name].append(took)
    return times


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Run python with these arguments; return the wall and CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=True)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_table(title: str, times: dict[str, list[tuple[float, float]]], base: str) -> None:
    """Print medians, and the median of each round's ratio to the base."""
    print(f"\n| {title} | wall s | ratio | CPU s | ratio |\n|---|--:|--:|--:|--:|")
    for name, took in times.items():
        cells = [name]
        for index in range(2):
            ratios = [one[index] / other[index] for one, other in zip(took, times[base], strict=True)]
            cells += [f"{statistics.median(one[index] for one in took):.3f}", f"{statistics.median(ratios):.3f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
