"""Errors of the Hugging Face hub, as one line that names what to do."""

from __future__ import annotations

from textwrap import shorten

LONGEST = 200  # characters of a library's own message


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

    page = f"https://huggingface.co/{model}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.GatedRepoError):
            return f"it is gated: accept its licence at {page}, then {login}"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"there is no such model at {page}, or it is private: check the name, or {login}"
        if isinstance(cause, errors.LocalEntryNotFoundError):
            return "the hub cannot be reached from here; give the folder of a copy, or try again with a network"
        if isinstance(cause, errors.EntryNotFoundError):
            return brief(cause)
        cause = cause.__cause__ or cause.__context__
    return brief(error)
