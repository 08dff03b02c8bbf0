"""What a process sets up before anything else: what it imports, how it uses memory, its settings and its log."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from app.config import DOTENV
from app.core.errors import BadSettings

if TYPE_CHECKING:
    from app.config.settings import Settings


BAD_SETTINGS = 78


def unsupported(system: str) -> str:
    """Why `os.name` is none that this runs on, "" where it is one."""
    if system != "nt":
        return ""
    return "Headwater runs on Linux and macOS: on Windows install it in WSL 2, or use Docker (docs/deploy/windows.md)"


class Absent:
    """Hides a package from all imports that follow; see `importlib.abc.MetaPathFinder`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse the package, leave the others to the next finder."""
        if name == self._name:
            raise ModuleNotFoundError(f"{name} is not for this process", name=name)


def tune() -> None:
    """What a process of half a core and little memory wants; before anything heavy is imported."""
    # Arrow's own pool keeps some 50 MiB that the system's allocator gives back.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # numpy's linear algebra, which nothing here uses, would start a thread with buffers for each core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pyarrow and DuckDB import pandas wherever it is installed, 91 MiB for nothing: here it is never asked for.
    sys.meta_path.insert(0, Absent("pandas"))


def show_pandas() -> None:
    """Let what is imported from here on find pandas: Spark's client needs it."""
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, Absent)]


def configured(
    environ: Mapping[str, str] = os.environ, dotenv: Path | None = DOTENV, *, daemon: bool = False, file: bool = True
) -> "Settings":
    """Settings of this environment, with logging set up: of a command on stderr, and not into the daemon's file.

    `file` False: the daemon's log goes to stdout alone.
    """
    from app.config.environment import load_settings, secrets_of
    from app.ops import logs

    settings = load_settings(environ, dotenv)
    service = settings.service
    try:  # what is written to DATA_DIR first would otherwise be blamed
        service.data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=service.data_dir):
            pass
    except OSError as error:
        allowed = "allowed: a directory that this user can write to"
        raise BadSettings([f"DATA_DIR='{service.data_dir}': {error.strerror}; {allowed}"]) from error
    logs.configure(
        service.log_level,
        service.log_format if daemon else "text",
        service.log_file if daemon and file else None,
        log_files=service.log_files,
        secrets=secrets_of(settings),
        stream=sys.stdout if daemon else sys.stderr,
    )
    return settings


# A job that computes holds the interpreter for this long at most before a request gets its turn.
SWITCH_SECONDS = 0.002


def share_the_machine() -> None:
    """For a process that serves and runs jobs at once."""
    sys.setswitchinterval(SWITCH_SECONDS)
    give_back_large_blocks()


# The C library's allocator, told to give large blocks back to the system as soon as they are free.
#
# Left alone, glibc raises the size from which it does so with each large block that is freed, up to 32 MiB; the
# parts of uploads and the buffers of tables then stay in its heaps, and the daemon keeps some 35 MiB more than it
# uses. It would also make a heap for each of a dozen threads, which each keep what is free in it; on half a core
# two are enough.

LARGE_BYTES = 1 << 20
TOP_BYTES = 16 << 20  # less than this makes the heap shrink and grow with every block of a body
HEAPS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def give_back_large_blocks() -> None:
    """For the whole process. Does nothing where the C library is another."""
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, TOP_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)
