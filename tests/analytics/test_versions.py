"""A set of versions is a set, whatever their bytes and however many."""

import random

import app.analytics.version_set as module
from app.analytics.version_set import SIZE, VersionSet


def version(draw: random.Random) -> bytes:
    """Close to others, with zero bytes anywhere: what arrays of text would confuse."""
    return bytes(draw.choices((0, 0, 1, 255), k=SIZE))


def test_what_was_added_and_not_dropped_is_there_to_the_last_bit() -> None:
    draw = random.Random(1)  # noqa: S311 - test data
    versions, expected = VersionSet(), set[bytes]()
    assert versions.among([]) == []
    for turn in range(18):
        earlier, was = versions.copy(), frozenset(expected)
        for _ in range(draw.randrange(3 * module.LOOSE // 20)):
            one = version(draw)
            if not any(versions.among([one])):
                versions.add(one)
                expected.add(one)
        if turn % 3 == 2:
            kept = draw.sample(sorted(expected), len(expected) * 2 // 3)
            packed = b"".join([*kept, *(version(draw) for _ in range(50)), *kept[:50]])
            gone = versions.beyond(packed)
            assert sorted(gone) == sorted(
                expected.difference(packed[at : at + SIZE] for at in range(0, len(packed), SIZE))
            )
            versions.drop(gone)
            expected.difference_update(gone)
        asked = [*draw.sample(sorted(expected), len(expected) // 3), *(version(draw) for _ in range(300))]
        assert versions.among(asked) == [one in expected for one in asked]
        assert len(versions) == len(expected)
        assert earlier.among(asked) == [one in was for one in asked], "a copy stays as it was"
    versions.drop(versions.beyond(b""))
    assert len(versions) == 0
    assert versions.beyond(b"") == []
