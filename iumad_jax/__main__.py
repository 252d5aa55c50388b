"""The command iumad, which runs the commands by name; python -m iumad_jax does the same."""

import difflib
import sys
from importlib import import_module
from types import ModuleType

from iumad_jax.cli import summary_and_example, until_closed
from iumad_jax.errors import USER_ERROR, UserError

COMMANDS = {  # modules of the commands by name
    "prepare": "prepare",
    "main": "main",
    "learn": "learn",
    "calibrate": "calibrate",
    "retire": "retire",
    "history": "history",
    "evaluate": "evaluate",
    "predict": "predict",
    "robustness": "robustness",
    "latency": "latency",
    "export": "export.__main__",
    "choose": "choose",
    "benchmark": "benchmark",
    "synthetic": "data.synthetic.__main__",
}


def main() -> int:
    """Run the command that the first argument names, or list all commands; return the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return _module(name).main([name, *arguments])
    if name not in ("-h", "--help"):
        near = difflib.get_close_matches(name, COMMANDS, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(COMMANDS)}."
        print(f"iumad_jax: {UserError(f'{name} is not a command; {remedy}')}", file=sys.stderr)
        return USER_ERROR
    return until_closed(_list)


def _list() -> int:
    """List all commands."""
    print("Commands, with an example each; iumad COMMAND is short for it, and --help explains the flags:\n")
    for name in COMMANDS:
        summary, example = summary_and_example(str(_module(name).__doc__))
        print(f"{example}\n    {summary}")
    return 0


def _module(name: str) -> ModuleType:
    return import_module(f"iumad_jax.{COMMANDS[name]}")


if __name__ == "__main__":
    sys.exit(main())
