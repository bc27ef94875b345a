"""Images by the names that a list of captions gives them."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

from davae.data.captions.file_names import folded, stem
from davae.data.formats import is_image_name


def listed_path(folder: str, name: str) -> str:
    """Return the path of a file that a list in a folder names, with accents composed."""
    return unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(folder, name.replace("\\", "/"))))


class ImageNames:
    """Find images by path, without regard to case, or by the end of a path.

    Args:
        root: absolute path of the set.
        names: relative paths of the images that are read.
        elsewhere: paths of images that exist but are not read (another split); they follow in the numbering.
    """

    def __init__(self, root: str, names: Sequence[str], elsewhere: Iterable[str]):
        self.root, self.count = root, len(names)
        self._names, self._elsewhere = names, elsewhere
        self._folded: dict[str, list[int]] = {}
        self._stems: dict[str, list[int]] = {}

    @cached_property
    def paths(self) -> list[str]:
        """Paths of all images, with accents composed."""
        return [unicodedata.normalize("NFC", name) for name in (*self._names, *self._elsewhere)]

    @cached_property
    def _exact(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.paths)}

    def find(self, folder: str, name: str) -> int | None:
        """Return the number of the image that a list in `folder` calls `name`, or None."""
        plain = unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(folder, name)))
        if (found := self._exact.get(plain)) is not None:
            return found
        path = listed_path(folder, name)
        if path.startswith(f"{self.root}/"):
            path = path[len(self.root) + 1 :]
        if (found := self._exact.get(path)) is not None:
            return found
        return _only(self._by_fold().get(folded(path), ()))

    def find_near(self, name: str) -> int | None:
        """Return the one image whose path ends with `name` or is its end, with or without suffix."""
        self._by_fold()
        given = folded(listed_path("", name)).lstrip("/")
        bare = stem(given) if is_image_name(given) else given
        found = []
        for place in self._stems.get(posixpath.basename(bare), ()):
            path = folded(self.paths[place])
            own, other = (path, given) if bare != given else (stem(path), bare)
            if f"/{own}".endswith(f"/{other}") or f"/{other}".endswith(f"/{own}"):
                found.append(place)
        return _only(found)

    def _by_fold(self) -> dict[str, list[int]]:
        if not self._folded:
            whole, stems = defaultdict(list), defaultdict(list)
            for place, path in enumerate(self.paths):
                whole[folded(path)].append(place)
                stems[posixpath.basename(stem(folded(path)))].append(place)
            self._folded, self._stems = whole, stems
        return self._folded


def _only(places: Sequence[int]) -> int | None:
    return places[0] if len(places) == 1 else None
