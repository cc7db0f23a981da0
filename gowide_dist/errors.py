"""Errors that the user sees as one line."""

import errno
import os
import sys


class UserError(Exception):
    """An error that the user can fix: what is wrong, where, and what to do, in one line. Exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InternalError(Exception):
    """An error that the user cannot fix, in one line. Exit status 1."""


class RecipeError(UserError):
    """The recipe, an override or a cluster profile is invalid."""


class DataError(UserError):
    """A dataset is absent, damaged or not what the recipe expects."""


class StallError(DataError):
    """Data do not come in time: the file server may answer again later."""


class RunError(UserError):
    """A run directory is damaged, locked or another recipe's, or a file cannot be written."""


def number_from(variable: str, default: int, least: int = 0) -> int:
    """The whole number in a variable of the environment; of a list, as OMP_NUM_THREADS may be, the first."""
    text = os.environ.get(variable, "").partition(",")[0].strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{variable}={text}: should be a whole number, {least} or more")
    return int(text)


FULL_DISK = "disk full or quota exceeded; free space and run the same command again"


_WHAT_TO_DO = {
    errno.EROFS: "choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another file system",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def fixable(error: OSError | ImportError) -> str | None:
    """The line for an error of the system that the user can fix; None for any other."""
    if "cannot open shared object file" in str(error):  # of a package's compiled part, by the linker
        return f"{str(error).partition(':')[0]} is missing, a library of the system; see `gowide doctor`"
    if (
        isinstance(error, ModuleNotFoundError)
        and (package := (error.name or "gowide_dist").split(".")[0]) != "gowide_dist"
    ):
        return f"the package {package} is not installed in {sys.prefix}; see `gowide doctor`"
    if isinstance(error, ImportError):
        return None
    if is_full(error):
        return FULL_DISK
    if error.errno in _WHAT_TO_DO:
        return f"{error.filename or 'a file'}: {error.strerror}; {_WHAT_TO_DO[error.errno]}"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another place"
    return None


def is_full(error: OSError) -> bool:
    """Whether the disk is full, or the quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)  # of a network file system


def may_pass(error: BaseException | None) -> bool:
    """Whether a stalling file server is behind an error, so that the same may work at the next start."""
    while error:
        if isinstance(error, StallError) or (isinstance(error, OSError) and error.errno in _PASSING):
            return True
        error = error.__cause__ or error.__context__
    return False
