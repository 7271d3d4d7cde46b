"""The errors a user can cause. Each says what is wrong, where, and what to do; none needs a traceback."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of a line; its type where it says nothing."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes in bold
    return (plain.strip().splitlines() or [type(error).__name__])[0][:200]


class RkdError(Exception):
    """Something a user can mend. ``problems`` holds one line each; the command ends with ``exit_code``."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class SettingsError(RkdError):
    """A flag, a configuration file, or two of them that contradict each other."""


class DataError(RkdError):
    """A data set that is absent, incomplete or damaged."""


class CheckpointError(RkdError):
    """A file that is no checkpoint of ours, or not the one that the flags describe."""


class WeightsError(RkdError):
    """Pretrained weights that are not here and could not be fetched, or do not fit the network."""


class DownloadError(RkdError):
    """A file that could not be fetched, verified or unpacked. Nothing wrong is left in place."""


class RunError(RkdError):
    """A run that cannot go on although the request was right: a full disk, a loss that is not finite."""

    exit_code = 1


class Interrupted(Exception):  # noqa: N818  # no error: the run was asked to stop, and has saved where it stands
    """The run stopped because it was asked to; ``--resume`` goes on with it."""
