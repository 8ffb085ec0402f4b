"""One rank that runs scripts, on Accelerate or through the switch, and writes down the numbers that they return.

python -m tests.compat.child SIDE GROUP FOLDER RUN...
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

SIDES = ("real", "switched")


def main(side: str, group: str, folder: str, *runs: str) -> None:
    """Do the runs of a group, one after the other in this process."""
    warnings.simplefilter("ignore")
    # Where it hangs, if it does.
    faulthandler.dump_traceback_later(float(os.environ.get("DUMP_AFTER", "600")), exit=True)
    if side == "switched":
        from paceline.compat import install_as_accelerate

        install_as_accelerate()
        assert importlib.import_module("accelerate").__name__ == "paceline.compat.accelerate"
    import torch

    torch.set_num_threads(1)
    module: Any = importlib.import_module(f"tests.compat.{group}")
    rank = int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {}
    for number, name in enumerate(runs):
        # A group that ended may still hold its port.
        os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[number]
        place = Path(folder, f"run{number}")
        place.mkdir(exist_ok=True)
        before = dict(os.environ)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = module.run(name, str(place))
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
        if "error" in found[name] and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # The other ranks may wait for this one in the middle of the run.
            os._exit(1)
        os.environ.clear()
        os.environ.update(before)
        _start_afresh()


def _start_afresh() -> None:
    """Forget what a run leaves in the process: the states, and the process group."""
    state = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    import torch.distributed as dist

    gc.collect()
    # DeepSpeed keeps the groups that it made, and could not use them in another world.
    if dist.is_initialized() and "deepspeed" not in sys.modules:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Without the ends of libraries' threads, which take seconds.
    os._exit(0)
