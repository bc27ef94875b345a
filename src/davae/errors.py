"""Errors that a user can mend: one readable line each, and exit status 2."""

from __future__ import annotations


class DavaeError(Exception):
    """Base of every error that davae raises for the user to mend."""


class RecipeError(DavaeError, ValueError):
    """A recipe that cannot be used."""


class DataError(DavaeError, ValueError):
    """Data that cannot be used."""


class ModelError(DavaeError, ValueError):
    """A pretrained model that cannot be used."""


class RunError(DavaeError, RuntimeError):
    """A run that cannot go on, or a file that cannot be written."""


class Interrupted(DavaeError, RuntimeError):
    """A run that a signal stopped, with everything saved and exit status 130."""


class UnreadableImage(DavaeError):
    """One image that cannot be used, which a data set leaves out.

    Attributes:
        kind: the fault in two or three words; left-out images are counted by it.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
