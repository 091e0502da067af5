"""The exception tree. Imports nothing, so that every room can raise.

An error that a user can act on is a :class:`GgufkitError`; the root command
prints its message and hint and exits with its code. Anything else is a bug
and keeps its traceback.
"""


class GgufkitError(Exception):
    """An error to show to the user.

    Args:
        message: what is wrong, with the name or number that shows it.
        hint: what to do next, best of all a command that can be typed.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GgufkitError):
    """The request itself is wrong: an unknown type, two options that clash."""

    exit_code = 2


class IntegrityError(GgufkitError):
    """Bytes are not what they should be: truncated, wrong hash, broken header."""

    exit_code = 3


class SourceError(GgufkitError):
    """A model or text could not be found or fetched."""


class CheckpointError(GgufkitError):
    """A checkpoint is incomplete or of a kind that cannot be handled."""


class ToolError(GgufkitError):
    """A native tool is missing, of the wrong commit, or failed."""


class ToolOutputError(ToolError):
    """A native tool printed something that could not be understood."""


class DiskSpaceError(GgufkitError):
    """The forecast says that the result will not fit on the disk."""
