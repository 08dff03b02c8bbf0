"""Kills the real process of a pipeline at random moments, over and over, and compares what is left with an undisturbed
installation over the same source.

Rounds are lived in worlds of at most WORLD_ROUNDS, each with a folder, outside systems and a seed of its own. In a
round what the pipeline remembers may be taken away or set back to an older copy, the source gets new and corrected
data, or loses an answer, and a command is killed while it works. At the end of a world commands run to their end.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from daemon import KEPT

TESTS = Path(__file__).parent
WORLD_ROUNDS = 20
TTL_SECONDS = 1.0
KILLED = {"LEASE_TTL_SECONDS": f"{TTL_SECONDS:g}", "LEASE_HEARTBEAT_SECONDS": "0.3"}
UNDISTURBED = {"LEASE_TTL_SECONDS": "30", "LEASE_HEARTBEAT_SECONDS": "5"}  # a busy machine may not end a run
WEDGED_AFTER_SECONDS = 60
FAULTS = ("lost", "doubled", "invented", "stale", "unequal", "wedged", "open_ledgers", "crashes")

Command = Sequence[str]


class World(Protocol):
    """One source, and two installations that deliver it: in the folders `killed` and `calm`."""

    @property
    def remembered(self) -> Sequence[str]:
        """Patterns below an installation's folder: what may be taken away or set back, alone or all together."""

    @property
    def to_the_end(self) -> Sequence[Command]:
        """What is run at the end to have everything that the source holds."""

    def environ(self, folder: Path) -> Mapping[str, str]:
        """The settings of the installation in `folder`, without DATA_DIR."""

    def change(self, chance: random.Random) -> None:
        """New data, corrected data, an answer that will be lost, or nothing."""

    def command(self, chance: random.Random) -> Command:
        """What is killed in this round."""

    def calm_down(self) -> None:
        """No answer is lost from now on."""

    def rows(self, folder: Path) -> Counter[str]:
        """What an installation has delivered, as often as it is there."""

    def source_rows(self) -> int:
        """How many of these a calm installation has at least."""


MakeWorld = Callable[[Path], AbstractContextManager[World]]


@dataclass
class Runner:
    """Real processes that run commands, forked from one that has everything imported; see `app_kills`."""

    process: "subprocess.Popen[str]"

    def begin(self, folder: Path, command: Command, environ: Mapping[str, str]) -> int:
        """Start one, the daemon for no words; its pid."""
        folder.mkdir(parents=True, exist_ok=True)
        base = {name: os.environ[name] for name in KEPT if name in os.environ}
        values = {**base, "DATA_DIR": str(folder), "LOG_FILE": "off", **environ}
        (folder / "environ.json").write_text(json.dumps(values))
        (folder / "command.json").write_text(
            json.dumps([*command, *(["--json"] if command and command[0] != "worker" else ())])
        )
        return asked(self.process, str(folder))

    def ended(self) -> int:
        """Its exit code, or minus the signal."""
        return asked(self.process, "")


def is_over(pid: int) -> bool:
    """Whether a process that nobody has waited for yet has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def asked(process: "subprocess.Popen[str]", line: str) -> int:
    """The number that `app_kills.py` answers to a line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@dataclass
class KilledProcess:
    """At most one process at a time. Its folder is its own; where its data are, the settings say."""

    runner: Runner
    folder: Path
    pid: int = field(default=0, init=False)

    @property
    def log(self) -> str:
        return "\n".join((self.folder / name).read_text(errors="replace") for name in ("answer.log", "said.log"))

    @property
    def is_over(self) -> bool:
        """Whether the process ended by itself."""
        return is_over(self.pid)

    def ended(self) -> int:
        """Its exit code."""
        self.pid = 0
        return self.runner.ended()

    def kill(self) -> int:
        """SIGKILL; the exit code, or minus the signal."""
        os.kill(self.pid, signal.SIGKILL)
        return self.ended()


@contextmanager
def started(environ: Mapping[str, str] | None = None) -> Iterator[Runner]:
    """A runner, until the block ends; `environ` is added to its environment."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    with subprocess.Popen(
        [sys.executable, str(TESTS / "app_kills.py")],
        env={**os.environ, "PYTHONPATH": paths, **(environ or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Runner(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass
class Life:
    """The rounds of one world. `seconds`: the longest that a command lives; it follows how long they take."""

    world: World
    runner: Runner
    folder: Path
    chance: random.Random
    counts: Counter[str]
    seconds: float = 1.0

    @property
    def killed(self) -> Path:
        return self.folder / "killed"

    def live(self, rounds: int) -> Counter[str]:
        """All rounds, then both installations to the end; what was counted."""
        for _ in range(rounds):
            self._disturb()
            self.world.change(self.chance)
            self._kill()
        self.world.calm_down()
        for folder in (self.killed, self.folder / "calm"):
            self.counts["wedged"] += sum(not self._runs_to_the_end(folder, each) for each in self.world.to_the_end)
        self._compare(self.world.rows(self.killed), self.world.rows(self.folder / "calm"))
        return self.counts

    def _kill(self) -> None:
        """One command that is killed, unless it ends before."""
        time.sleep(TTL_SECONDS + 0.1)  # the lease of the one before has run out
        environ = {**self.world.environ(self.killed), **KILLED}
        pid = self.runner.begin(self.killed, self.world.command(self.chance), environ)
        time.sleep(self.chance.uniform(0, self.seconds))
        os.kill(pid, signal.SIGKILL)  # it is there until it is asked for
        was_killed = self.runner.ended() == -signal.SIGKILL
        self.counts["kills"] += was_killed
        self.seconds *= 1.2 if was_killed else 0.7  # one of three comes to its end
        if not was_killed:
            self._look_at(self.killed)

    def _disturb(self) -> None:
        """Now and then what is remembered is gone, or an earlier state of it is put in its place."""
        backup = self.folder / "backup"
        act, pattern = self.chance.randrange(4), self.chance.choice([*self.world.remembered, ""])
        patterns = [pattern] if pattern else self.world.remembered
        if act == 0:
            self.counts["taken_away"] += _remove(self.killed, patterns)
        elif act == 1 and self.killed.exists():
            shutil.rmtree(backup, ignore_errors=True)
            _copy(self.killed, backup, self.world.remembered)
        elif act == 2 and backup.exists():
            _remove(self.killed, patterns)
            _copy(backup, self.killed, patterns)
            self.counts["set_back"] += 1

    def _runs_to_the_end(self, folder: Path, command: Command) -> bool:
        """Whether a command ends well; what a killed one set aside before its commit is told once more before that."""
        deadline, code = time.monotonic() + WEDGED_AFTER_SECONDS, 0
        while time.monotonic() < deadline:
            self.runner.begin(folder, command, {**self.world.environ(folder), **UNDISTURBED})
            code = self.runner.ended()
            self._look_at(folder)
            if code == 0:
                return True
            time.sleep(0.2)
        said = f"exit code {code}: {(folder / 'answer.log').read_text()}{(folder / 'said.log').read_text()}"
        sys.stderr.write(f"{folder}: {' '.join(command)} is wedged: {said}\n")
        return False

    def _look_at(self, folder: Path) -> None:
        """What a command answered that was not killed."""
        answer, said = (folder / "answer.log").read_text(), (folder / "said.log").read_text()
        for what, bad in (("crashes", "Traceback" in said), ("open_ledgers", not _closes(answer))):
            self.counts[what] += bad
            if bad:
                sys.stderr.write(f"{folder}: {what}: {answer}\n{said}\n")

    def _compare(self, disturbed: Counter[str], calm: Counter[str]) -> None:
        lost, more = calm - disturbed, disturbed - calm
        doubled = Counter({row: number for row, number in more.items() if row in calm})
        invented = more - doubled
        missing = max(0, self.world.source_rows() - calm.total())
        found = {"lost": lost.total() + missing, "doubled": doubled.total(), "invented": invented.total()}
        self.counts.update(rows=calm.total(), **found)
        for what, rows in (("lost", lost), ("doubled", doubled), ("invented", invented)):
            for row in list(rows)[:5]:
                sys.stderr.write(f"{self.folder}: {what}: {row}\n")


def _closes(answer: str) -> bool:
    document: dict[str, Any] = json.loads(answer) if answer else {}
    return bool(document.get("ledger", {}).get("closes", True))


def _remove(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether anything was there."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(found)


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    target.mkdir(exist_ok=True)
    for path in [path for pattern in patterns for path in source.glob(pattern)]:
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, to) if path.is_dir() else shutil.copy2(path, to)


def lived(make: MakeWorld, runner: Runner, folder: Path, seed: str, rounds: int) -> Counter[str]:
    """A world of so many rounds in a new folder; what was counted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(seed)  # noqa: S311 - moments to kill at, no secret
    counts = Counter(dict.fromkeys(("rounds", "kills", "taken_away", "set_back", "rows", *FAULTS), 0))
    counts["rounds"] = rounds
    with make(folder) as world:
        return Life(world, runner, folder, chance, counts).live(rounds)


def faults(counts: Mapping[str, Any]) -> dict[str, int]:
    """What may not be."""
    return {name: counts[name] for name in FAULTS if counts.get(name)}


def summed(sittings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all sittings together, and the median of what was measured in them."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in sittings for name in each):
        values = [each[name] for each in sittings if name in each]
        if isinstance(values[0], list):
            total[f"median_{name}"] = round(median(chain.from_iterable(values)), 2)
        elif isinstance(values[0], int):
            total[name] = sum(values)
    return total


def main(make: MakeWorld, description: str) -> int:
    """See `sit`."""
    with started() as runner:
        return sit(lambda folder, seed, rounds: lived(make, runner, folder, seed, rounds), description)


def sit(live: Callable[[Path, str, int], Mapping[str, Any]], description: str) -> int:
    """Worlds until so many rounds are done; goes on where it stopped. 1 when something was lost, doubled or wedged.

    `live(folder, seed, rounds)` is one world; what it counts is one line of `sittings.jsonl`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=200, help="in all sittings together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no world after so long")
    parser.add_argument("--folder", type=Path, default=None, help="keeps sittings.jsonl; without it nothing is kept")
    given = parser.parse_args()
    until = time.monotonic() + given.minutes * 60
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the processes that were started
    with tempfile.TemporaryDirectory(prefix="kill-rounds-") as temporary:
        folder: Path = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"sittings-{given.seed}.jsonl"
        sittings = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        while (done := sum(each["rounds"] for each in sittings)) < given.rounds and time.monotonic() < until:
            place, seed = folder / f"from-{done}", f"{given.seed}-{done}"
            found = live(place, seed, min(WORLD_ROUNDS, given.rounds - done))
            sittings.append({"seed": seed, **found})
            with kept.open("a") as file:
                file.write(f"{json.dumps(sittings[-1])}\n")
            if not faults(found):
                shutil.rmtree(place)
    total = summed(sittings)
    sys.stdout.write(f"{json.dumps({'seed': given.seed, **total})}\n")
    return int(bool(faults(total)))
