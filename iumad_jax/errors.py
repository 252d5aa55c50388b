"""The error for mistakes of users, numbers in sentences, what is told once, and the exit codes of commands."""

import sys
from collections.abc import Hashable

USER_ERROR = 2  # a mistake of the user, reported in one sentence
INTERRUPTED = 75  # interrupted; the same command resumes from the last saved state (EX_TEMPFAIL of sysexits.h)
CLOSED_OUTPUT = 141  # the reader of standard output, such as head, ended first, as shells report SIGPIPE
STOPPED_AT_ONCE = 130  # stopped at once by a second SIGINT, as shells report it

_LONGEST = 4000  # characters


class UserError(Exception):
    """A mistake of the user, in one sentence: file, key or flag; what was found; what to do.

    Commands print it and exit with USER_ERROR. Unprintable characters are escaped and long sentences are shortened, so
    that names and contents of files cannot control or flood the terminal.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        half = _LONGEST // 2
        super().__init__(shown if len(shown) <= _LONGEST else f"{shown[:half]} ... {shown[-half:]}")


def counted(number: int, things: str) -> str:
    """Return a number with a noun, such as "1 image" or "3 images", given in the plural."""
    return f"{number} {things.removesuffix('s') if number == 1 else things}"


_told: set[Hashable] = set()


def tell_once(subject: Hashable, sentence: str) -> None:
    """Print a sentence to stderr, unless the user was told about this subject before."""
    if subject not in _told:
        _told.add(subject)
        print(f"iumad_jax: {UserError(sentence)}", file=sys.stderr, flush=True)
