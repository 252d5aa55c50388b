"""The one error a user can cause."""


class UserError(Exception):
    """One sentence for the user: the file, key or flag; what was found; what to do. Commands exit with code 2.

    What cannot be printed is escaped, so that no file's name or content reaches the terminal as commands to it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence))
