"""Lists the commands: python -m iumad_jax."""

import sys
from importlib import import_module

from iumad_jax.cli import summary_and_example
from iumad_jax.errors import USER_ERROR

COMMANDS = (
    "prepare",
    "main",
    "learn",
    "calibrate",
    "retire",
    "history",
    "evaluate",
    "predict",
    "robustness",
    "latency",
    "export.__main__",
    "choose",
    "benchmark",
    "data.synthetic.__main__",
)


def main(arguments: list[str]) -> int:
    """Print an example and a summary of each command; refuse arguments."""
    if arguments[1:] and arguments[1] not in ("-h", "--help"):
        print(f"iumad_jax: {arguments[1]} is not a flag; write python -m iumad_jax.COMMAND.", file=sys.stderr)
        return USER_ERROR
    print("Commands, with an example each; --help explains their flags:\n")
    for command in COMMANDS:
        summary, example = summary_and_example(str(import_module(f"iumad_jax.{command}").__doc__))
        print(f"{example}\n    {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
