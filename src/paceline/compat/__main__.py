"""`python -m paceline.compat script.py`: runs a script for which `import accelerate` means paceline."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from paceline.compat.install import install_as_accelerate
from paceline.errors import UsageError
from paceline.launch.command import Command, check_command
from paceline.launch.worker import run

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = """\
Usage: python -m paceline.compat [--] SCRIPT [ARGUMENTS]...
       python -m paceline.compat -m MODULE [ARGUMENTS]...

Run a script that was written for Accelerate (or that uses the Trainer of transformers, TRL or PEFT) on paceline:
`import accelerate` means paceline in it, and in the processes that it starts. Inside torchrun:

    torchrun --nproc_per_node 2 -m paceline.compat train.py --lr 1e-3

To start several processes, `paceline launch --as_accelerate train.py` does the same.
"""


def main(arguments: Sequence[str]) -> None:
    """Turn the switch on and run what the arguments name; does not return."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    option, rest = arguments[0], list(arguments[1:])
    if option not in ("--", "-m"):
        option, rest = "--", list(arguments)
    try:
        if not rest:
            raise UsageError(
                f"Nothing follows {option}", "There is nothing to run", "Name a script or a module after it"
            )
        command = Command(rest[0], tuple(rest[1:]), "module" if option == "-m" else "script")
        check_command(command, os.environ)
        install_as_accelerate()
    except UsageError as error:
        print(f"paceline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run([*(("--module",) if command.kind == "module" else ()), command.script, *command.arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
