"""Errors of the Hugging Face hub, as one line that names what to do."""

from __future__ import annotations

import socket
from functools import lru_cache
from textwrap import shorten
from time import monotonic
from urllib.parse import urlsplit
from urllib.request import getproxies

from davae.zoo import split_revision

LONGEST = 200  # characters of a library's own message
REACH_SECONDS = 5.0  # the client's own retries take half a minute
KEPT_SECONDS = 60  # longest that an answer counts: who began without a network gets the hub back


def brief(error: BaseException | str, longest: int = LONGEST) -> str:
    """Return an error's message on one line, cut between words."""
    text = str(error) or type(error).__name__
    return shorten(text, longest, placeholder=" ...")


def hub_reason(error: BaseException, model: str) -> str:
    """Return why the hub did not give a model, and what to type.

    Args:
        model: its hub id.
    """
    from huggingface_hub import errors

    name, revision = split_revision(model)
    page = f"https://huggingface.co/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.GatedRepoError):
            return f"it is gated: accept its licence at {page}, then {login}"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"it has no revision {revision}: take a branch, tag or commit of {page}/commits"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"there is no such model at {page}, or it is private: check the name, or {login}"
        if isinstance(cause, errors.LocalEntryNotFoundError):
            return "the hub cannot be reached from here; give the folder of a copy, or try again with a network"
        if isinstance(cause, errors.EntryNotFoundError):
            return brief(cause)
        cause = cause.__cause__ or cause.__context__
    return brief(error)


def hub_answers() -> bool:
    """Return whether the hub or a proxy listens, so that it may be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    parts = urlsplit(constants.ENDPOINT)
    return _listens(parts.hostname, parts.port or 443, monotonic() // KEPT_SECONDS)


@lru_cache(1)
def _listens(host: str | None, port: int, period: float) -> bool:
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError:
        return False
    return True
