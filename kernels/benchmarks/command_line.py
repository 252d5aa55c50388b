"""Parsers of the benchmark commands."""

import argparse


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
