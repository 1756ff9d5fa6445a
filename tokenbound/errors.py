"""The errors a user can meet, each with the exit code that a scheduler sees.

Every message names the field or file, the offending value and the cure. Programming errors stay
``AssertionError`` or whatever Python raises; they are never caught and renamed.
"""

import errno
import re
import signal


class TokenboundError(ValueError):
    """Base of all errors caused by input or environment; the command line prints its text and exits."""

    exit_code = 2


class InputError(TokenboundError):
    """A config, a file or a model cannot be used as given (exit code 2)."""


class ReplicaOutOfMemory(TokenboundError):
    """The batch does not fit into the memory of the device; a smaller batch shape may (exit code 2)."""


class IncompleteError(TokenboundError):
    """Something planned is not there yet: shards to score, losses or an artifact to verify (exit code 3)."""

    exit_code = 3


class MismatchError(TokenboundError):
    """Two things that must agree do not: digests, fingerprints, recomputed values (exit code 4)."""

    exit_code = 4


class WorseError(TokenboundError):
    """The new bound is worse than the user allows (exit code 5)."""

    exit_code = 5


class StoppedError(TokenboundError):
    """A signal asked the program to end (exit code 128 and its number, as shells have it: 130, 143)."""

    def __init__(self, number: int, *, resumable: bool) -> None:
        kept = "; what is done is kept: run the same command again to resume" if resumable else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{kept}")
        self.exit_code = 128 + number


DISK_ERRORS = (
    dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR), "choose a place that you may write to"
    )
    | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room or choose another disk, and run it again")
    | {
        errno.EFBIG: "raise the limit of file sizes (ulimit -f), and run it again",
        errno.EMFILE: "raise the limit of open files (ulimit -n), and run it again",
        errno.EIO: "the disk fails; choose another one, and run it again",
    }
)
"""What is wrong with a disk, a path or a limit rather than with the program, and its cure."""

_ERRNO = re.compile(r"\[Errno (\d+)\] ([^:\n]+)")


def disk_problem(error: OSError) -> str | None:
    """The place, the reason and the cure of an error of a disk; None for any other error.

    Args:
        error: whatever an operation on a file raised; of a library that only quotes the system, its text is read.

    >>> disk_problem(OSError(28, "No space left on device", "runs/x"))
    'runs/x: No space left on device; make room or choose another disk, and run it again'
    >>> disk_problem(ConnectionResetError("reset"))
    """
    number, reason = error.errno, error.strerror
    if number is None:
        quoted = _ERRNO.search(str(error))
        if quoted is None:
            return None
        number, reason = int(quoted[1]), quoted[2].strip()
    if number not in DISK_ERRORS:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{reason}; {DISK_ERRORS[number]}"
