"""Of many who come at once few go on in one turn of the event loop; all of them do, in order."""

import asyncio
from itertools import chain

from app.core.turns import Turns


async def gone_on(count: int, at_once: int, cancelled: frozenset[int] = frozenset()) -> list[list[int]]:
    """Who went on, turn by turn; somebody else looks once in each."""
    turns, order, seen = Turns(at_once), list[int](), list[list[int]]()

    async def come(number: int) -> None:
        await turns.wait()
        order.append(number)

    tasks = [asyncio.create_task(come(number)) for number in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        seen.append(order[:])
        for number in cancelled:
            tasks[number].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [now[len(before) :] for before, now in zip([[], *seen], [*seen, order], strict=True)]


def test_few_go_on_in_one_turn_and_all_in_order() -> None:
    went = asyncio.run(gone_on(100, 8))
    assert max(map(len, went)) == 8
    assert list(chain(*went)) == list(range(100))


def test_nobody_waits_where_there_is_room() -> None:
    assert asyncio.run(gone_on(8, 8))[0] == list(range(8))


def test_who_gave_up_takes_nobodys_turn() -> None:
    went = asyncio.run(gone_on(60, 8, frozenset(range(10, 40))))
    assert sorted(chain(*went)) == [*range(10), *range(40, 60)]
    assert max(map(len, went)) <= 8
