"""The errors a user can meet, each with the exit code that a scheduler sees.

Every message names the field or file, the offending value and the cure. Programming errors stay
``AssertionError`` or whatever Python raises; they are never caught and renamed.
"""

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
