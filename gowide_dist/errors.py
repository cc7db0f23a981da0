"""Errors that the user sees as one line."""

import errno


class UserError(Exception):
    """An error that the user can mend: what is wrong, where, and what to do, in one line. Exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InternalError(Exception):
    """An error that the user cannot mend, in one line. Exit status 1."""


class RecipeError(UserError):
    """The recipe, an override or a cluster profile is invalid."""


class DataError(UserError):
    """A dataset is absent, damaged or not what the recipe expects."""


class RunError(UserError):
    """A run directory is damaged, locked or another recipe's, or a file cannot be written."""


FULL_DISK = "disk full or quota exceeded; free space and run the same command again"


def mendable(error: OSError) -> str | None:
    """The line for an OSError that the user can mend; None for any other."""
    if is_full(error):
        return FULL_DISK
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another place"
    return None


def is_full(error: OSError) -> bool:
    """Whether the disk is full, or the quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
