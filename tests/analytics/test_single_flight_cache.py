"""What is kept of answers: for a time, small ones, and nothing longer than it can be given."""

import asyncio
import tempfile
from pathlib import Path

from app.analytics.formats import ReportAnswer
from app.analytics.service import KEPT_BYTES, SingleFlightCache


class Made:
    """Answers in files of a folder, which say whether anybody still has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[object] = []

    def __call__(self, size_bytes: int) -> ReportAnswer:
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - the answer closes it
        file.truncate(size_bytes)
        self._files.append(file)
        return ReportAnswer(file)

    async def are_open(self, number: int) -> bool:
        """So many and no more. The thread that made an answer may let go of it a moment after it was handed over."""
        for _ in range(500):
            if sum(not file.closed for file in self._files) == number:  # type: ignore[attr-defined]
                return True
            await asyncio.sleep(0.01)
        return False


def test_an_answer_is_given_again_for_its_time_and_its_file_goes_with_the_next_question(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, made = SingleFlightCache(), Made(tmp_path)
        for number in range(5):
            await cache.answer(number, lambda: made(10), lambda _: 0.05)
        lasting = await cache.answer("lasting", lambda: made(20), lambda _: 60)
        assert cache.held("lasting") is lasting
        await asyncio.sleep(0.1)
        assert cache.held("another") is None
        assert await made.are_open(1)
        assert cache.held("lasting") is lasting
        await cache.answer("short", lambda: made(10), lambda _: 0)
        await cache.answer("next", lambda: made(10), lambda _: 60)
        assert await made.are_open(2), "what lands drops what is over too"

    asyncio.run(scenario())


def test_a_large_answer_is_given_to_who_waits_for_it_and_not_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, made = SingleFlightCache(), Made(tmp_path)
        first, second = await asyncio.gather(
            *(cache.answer("large", lambda: made(KEPT_BYTES + 1), lambda _: 60) for _ in range(2))
        )
        assert first is second
        assert cache.held("large") is None
        await cache.answer("small", lambda: made(KEPT_BYTES), lambda _: 60)
        assert cache.held("small") is not None
        del first, second
        assert await made.are_open(1)

    asyncio.run(scenario())
