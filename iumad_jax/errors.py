"""The one error a user can cause."""

_LONGEST = 4000  # characters


class UserError(Exception):
    """One sentence for the user: the file, key or flag; what was found; what to do. Commands exit with code 2.

    What cannot be printed is escaped, and the middle of too long a sentence left out: nothing that a file holds or is
    called reaches the terminal as commands to it, or floods it.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        half = _LONGEST // 2
        super().__init__(shown if len(shown) <= _LONGEST else f"{shown[:half]} ... {shown[-half:]}")
