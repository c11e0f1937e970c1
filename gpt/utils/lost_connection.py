"""The errors of gloo and NCCL when a rank is gone; they have no type of their own, only messages."""

import re

from gpt.utils.helper import first_line

TIMED_OUT = ("Timed out waiting", "Application timeout", "Watchdog caught collective operation timeout")
"""Parts of messages when another rank does not answer in time: gloo's in the same collective and in others, NCCL's."""
NCCL_LOST = (
    *("NCCL error", "ncclRemoteError", "ncclSystemError", "ncclInternalError", "ncclUnhandledCudaError"),
    "NCCL communicator was aborted",
)
"""Parts of NCCL's messages when a collective fails, as it does when a rank is gone."""
GLOO_LOST = ("Connection closed", "Connection reset", "Broken pipe", "gloo")
"""Parts of gloo's messages when a rank is gone."""
CPP_PLACE = re.compile(r"\[/[^\]]*\] ?")
"""File and line of C++ code in gloo's messages."""


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because a rank is gone or does not answer in time."""
    return any(words in str(error) for words in (*TIMED_OUT, *NCCL_LOST, *GLOO_LOST))


def has_timed_out(error: RuntimeError) -> bool:
    """Return whether a collective failed because a rank does not answer in time."""
    return any(words in str(error) for words in TIMED_OUT)


def describe_connection(error: RuntimeError) -> str:
    """Return the reason in the first line of an error.

    >>> describe_connection(RuntimeError("failed with [/src/gloo/pair.cc:152] timed out connecting"))
    'failed with timed out connecting'
    """
    return CPP_PLACE.sub("", first_line(error))
