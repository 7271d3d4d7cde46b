"""Errors that a user can cause and fix. Each names the thing, the reason and the remedy, without a traceback."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or its type if it has none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch uses bold text
    return (plain.strip().splitlines() or [type(error).__name__])[0][:200]


class RkdError(Exception):
    """Something the user can fix: one line per problem. The command exits with ``exit_code``."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class SettingsError(RkdError):
    """A wrong flag or configuration file, or a contradiction between them."""


class DataError(RkdError):
    """A data set that is missing, incomplete or damaged."""


class CheckpointError(RkdError):
    """A file that is not an rkd checkpoint, or contradicts the flags."""


class WeightsError(RkdError):
    """Pretrained weights that cannot be downloaded, or do not fit the network."""


class DownloadError(RkdError):
    """A file that cannot be downloaded, verified or unpacked. Nothing damaged remains on disk."""


class RunError(RkdError):
    """A failure at run time: a full disk, a loss that is not finite."""

    exit_code = 1


class Interrupted(Exception):  # noqa: N818  # not an error
    """The run saved and stopped after a signal; ``--resume`` resumes it."""
