"""The one error a user can cause."""


class UserError(Exception):
    """One sentence for the user: the file, key or flag; what was found; what to do. Commands exit with code 2."""
