"""Errors that are shown as one plain line."""

import errno


class UserError(Exception):
    """What the user can mend: what is wrong, where, and what to do about it, in one line. Exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InternalError(Exception):
    """What the user cannot mend, in one line. Exit status 1."""


class RecipeError(UserError):
    """The recipe, or an override of it, says something that cannot be done."""


class DataError(UserError):
    """A dataset on disk is missing, damaged or not what the recipe expects."""


class RunError(UserError):
    """A run directory holds something else than this recipe would write."""


FULL_DISK = "the disk is full or the quota used up; make room, and the same command continues"


def mendable(error: OSError) -> str | None:
    """The line for an error of the operating system that the user can mend; None for any other."""
    if is_full(error):
        return FULL_DISK
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another place"
    return None


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
