"""Errors that the user can mend: shown as one plain line, exit status 2."""

import errno


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RecipeError(UserError):
    """The recipe, or an override of it, says something that cannot be done."""


class DataError(UserError):
    """A dataset on disk is missing, damaged or not what the recipe expects."""


class RunError(UserError):
    """A run directory holds something else than this recipe would write."""


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
