"""The one error that a user can cause, and the exit codes of commands, 0 aside."""

USER_ERROR = 2  # told in a sentence
INTERRUPTED = 75  # stopped with all work saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
STOPPED_AT_ONCE = 130  # stopped at once, by a second SIGINT; what a shell says of a process that SIGINT ended

_LONGEST = 4000  # characters


class UserError(Exception):
    """One sentence for the user: the file, key or flag; what was found; what to do. Commands exit with USER_ERROR.

    What cannot be printed is escaped, and the middle of too long a sentence left out: nothing that a file holds or is
    called reaches the terminal as commands to it, or floods it.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        half = _LONGEST // 2
        super().__init__(shown if len(shown) <= _LONGEST else f"{shown[:half]} ... {shown[-half:]}")
