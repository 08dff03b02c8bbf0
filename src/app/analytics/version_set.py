"""A compact set of versions: 16 bytes each, sorted and concatenated.

Invariants: membership is exact, compared on all bits; a reader in another thread sees the set either before or after
a change.
"""

from collections.abc import Sequence
from typing import Any

from app.db.object_summaries import Version

SIZE = 16
LOOSE = 16_384
SHARE = 8


class VersionSet:
    """A set that one thread writes and any thread may read."""

    def __init__(self) -> None:
        # One attribute, so that a reader never combines the sorted versions of one state with the loose ones of
        # another.
        self._held: tuple[bytes, set[Version]] = (b"", set())

    def __len__(self) -> int:
        packed, loose = self._held
        return len(packed) // SIZE + len(loose)

    def copy(self) -> "VersionSet":
        """An independent copy of the set. The sorted part is shared, not copied."""
        packed, loose = self._held
        made = VersionSet()
        made._held = (packed, set(loose))
        return made

    def among(self, versions: Sequence[Version]) -> Sequence[bool]:
        """For each version, whether it is in the set."""
        packed, loose = self._held
        found: list[bool] = is_among(b"".join(versions), packed).tolist() if packed else [False] * len(versions)
        return [one or version in loose for one, version in zip(found, versions, strict=True)] if loose else found

    def add(self, version: Version) -> None:
        """Add a version that is not in the set."""
        packed, loose = self._held
        loose.add(version)
        if len(loose) >= max(LOOSE, len(packed) // SIZE // SHARE):
            self._held = (in_order(packed + b"".join(loose)), set())

    def extend(self, packed: bytes) -> None:
        """Add concatenated versions, in any order, none of which is in the set."""
        self._held = (in_order(self.joined + packed), set())

    @property
    def joined(self) -> bytes:
        """All versions, concatenated in any order."""
        return self._held[0] + b"".join(self._held[1])

    def beyond(self, packed: bytes) -> Sequence[Version]:
        """All versions of the set that are not in `packed`, which holds concatenated versions in any order."""
        return beyond(self.joined, packed)

    def drop(self, versions: Sequence[Version]) -> None:
        """Remove these versions."""
        packed, loose = self._held
        is_gone = is_among(packed, in_order(b"".join(versions)))
        self._held = (_array(packed)[~is_gone].tobytes(), loose.difference(versions))


def _array(packed: bytes) -> Any:
    import numpy as np

    return np.frombuffer(packed, f"S{SIZE}")  # compared byte by byte; all have the same length


def in_order(packed: bytes) -> bytes:
    """Sort concatenated versions."""
    import numpy as np

    found: bytes = np.sort(_array(packed)).tobytes()
    return found


def beyond(wanted: bytes, packed: bytes) -> Sequence[Version]:
    """Versions of `wanted` that are not in `packed`; both are concatenated in any order."""
    gone: bytes = _array(wanted)[~is_among(wanted, in_order(packed))].tobytes()
    return [gone[start : start + SIZE] for start in range(0, len(gone), SIZE)]


def is_among(wanted: bytes, held: bytes) -> Any:
    """A boolean mask over `wanted`: which of them are in `held`, which is sorted."""
    import numpy as np

    array, looked = _array(held), _array(wanted)
    if not len(array):
        return np.zeros(len(looked), bool)
    places = np.searchsorted(array, looked)
    places[places == len(array)] = 0
    return array[places] == looked
