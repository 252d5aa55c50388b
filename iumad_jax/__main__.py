"""List the commands: python -m iumad_jax."""

from importlib import import_module

from iumad_jax.cli import summary_and_example

COMMANDS = ("prepare", "main", "evaluate", "predict", "robustness", "latency", "export.__main__", "benchmark")


def main() -> str:
    """Return an example and a summary of each command."""
    docs = (str(import_module(f"iumad_jax.{command}").__doc__) for command in COMMANDS)
    commands = (f"{example}\n    {summary}" for summary, example in map(summary_and_example, docs))
    return "\n".join(["Commands; --help explains each:", "", *commands])


if __name__ == "__main__":
    print(main())
