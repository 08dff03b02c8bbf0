"""A set of versions is a set, whatever their bytes and however many."""

import random

from app.analytics.summaries import SIZE, among, beyond, united, without


def version(draw: random.Random) -> bytes:
    """Close to others, with zero bytes anywhere: what arrays of text would confuse."""
    return bytes(draw.choices((0, 0, 1, 255), k=SIZE))


def test_what_was_added_and_not_dropped_is_there_to_the_last_bit() -> None:
    draw = random.Random(1)  # noqa: S311 - test data
    held, expected = b"", set[bytes]()
    assert among([], held) == []
    for turn in range(18):
        earlier, was = held, frozenset(expected)
        new = {version(draw) for _ in range(draw.randrange(2500))}
        added = [one for one, is_held in zip(new, among(list(new), held), strict=True) if not is_held]
        assert set(added) == new - expected
        held = united(held, added)
        expected |= new
        if turn % 3 == 2:
            kept = draw.sample(sorted(expected), len(expected) * 2 // 3)
            packed = b"".join([*kept, *(version(draw) for _ in range(50)), *kept[:50]])
            gone = beyond(held, packed)
            assert sorted(gone) == sorted(
                expected.difference(packed[at : at + SIZE] for at in range(0, len(packed), SIZE))
            )
            held = without(held, gone)
            expected.difference_update(gone)
        asked = [*draw.sample(sorted(expected), len(expected) // 3), *(version(draw) for _ in range(300))]
        assert among(asked, held) == [one in expected for one in asked]
        assert held == b"".join(sorted(expected))
        assert among(asked, earlier) == [one in was for one in asked], "an earlier set stays as it was"
    held = without(held, beyond(held, b""))
    assert held == b""
    assert beyond(held, b"") == []
