"""How the rounds of the export tell what is wrong with the objects."""

from export_world import Fields, Row, differences


def row(number: int) -> Row:
    return "D1", "bulb", "Plant-A", "", number


def test_rows_that_are_lost_doubled_invented_and_stale_are_told_apart() -> None:
    source: dict[Row, Fields] = {row(number): {"voltage": number} for number in range(5)}
    objects: dict[Row, list[Fields]] = {
        row(1): [{"voltage": 1}],
        row(2): [{"voltage": 2}, {"voltage": 2}],
        row(3): [{"voltage": 7}],
        row(4): [{"voltage": 4, "count": 1}],
        row(9): [{"voltage": 9}],
    }
    assert differences(source, objects) == {"lost": 1, "doubled": 1, "invented": 1, "stale": 2}
