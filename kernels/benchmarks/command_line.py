"""Parsers of the benchmark commands."""

import argparse
from collections.abc import Iterable


def parser(doc: str) -> argparse.ArgumentParser:
    """Create a parser whose --help begins with the example of a command's docstring.

    Args:
        doc: Summary, example and description, separated by empty lines.
    """
    summary, example, *description = doc.strip().split("\n\n")
    return argparse.ArgumentParser(
        usage=example.strip(),
        description="\n\n".join([summary, *description]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def training_parser(doc: str, configs: Iterable[str], seconds: float) -> argparse.ArgumentParser:
    """Create a parser with the flags of a command that times training updates: the config, its size and the time.

    Args:
        doc: Summary, example and description, separated by empty lines.
        configs: Names of the configs.
        seconds: Default time for all turns.
    """
    result = parser(doc)
    result.add_argument(
        "--config",
        default="quickstart",
        choices=sorted(configs),
        help="Config of the training; the default is quickstart.",
    )
    result.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help="Images per update; the default, 0, is the batch size of the config.",
    )
    result.add_argument(
        "--seconds", type=float, default=seconds, help=f"Time for all turns, in seconds; the default is {seconds:g}."
    )
    result.add_argument(
        "--small", action="store_true", help="Run at a tiny size, only to check that the benchmark works."
    )
    return result
