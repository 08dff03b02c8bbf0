"""Writes down what others rely on: `python public_interface.py FOLDER SNAPSHOTS [POSTGRES_URL POSTGRES_URL]`.

All is asked as a user would: by command line and HTTP, and read from the files and tables that are left. The past is
backfilled, so that names and rows are the same at any time; of what depends on the present only shapes are told.
"""

import asyncio
import gzip
import io
import json
import os
import re
import sqlite3
import sys
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, redirect_stdout
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import psycopg
from fastapi.routing import iter_route_contexts

from app.config.environment import load_settings
from app.csv_inbox.config import InboxConfig
from app.db.state import open_state
from app.main import build
from app.ops import commands as one_off
from public_calls import CALLS, FROM_TO
from public_world import INBOX, PULLED, SPAN, Commands, World, drop, use
from shapes import Shapes, inline, lines, schema

ROOT = Path(__file__).resolve().parents[1]
LOGGED = re.compile(r"^\S+Z (?=- )")
HEX = re.compile(r"\b[0-9a-f]{32}\b")
STAMP = re.compile(r"\d{8}T\d{6}\.\d+(-[0-9a-f]{8})?")
REFUSED = (
    ("nonsense",),
    ("run", "nonsense"),
    ("backfill", "csv_inbox", *SPAN),
    ("verify", "influx_to_s3", "--from", "2026-02-10", "--to", "2026-02-09"),
    ("keys", "new", "Bad Name", "--scopes", "read"),
)


def helps(commands: Commands, *names: str) -> Iterator[str]:
    """The help of a command and of those below it."""
    text = commands.run(*names, "--help")
    yield text
    for name in re.findall(r"^    ([a-z-]+)", text, re.MULTILINE):
        yield from helps(commands, *names, name)


def variables(commands: Commands) -> Iterator[str]:
    """Each variable with its default, its other names and what is allowed; and what comes out when nothing is set."""
    notes: list[str] = []
    for line in (ROOT / ".env.example").read_text(encoding="utf-8").splitlines():
        if note := re.match(r"#   ((?:also|allowed): .*)", line):
            notes.append(note[1])
        elif variable := re.match(r"#([A-Z]\w+=.*)", line):
            yield "  # ".join((variable[1], *notes))
            notes.clear()
    yield "\nvalues that check shows when nothing is set"
    values = json.loads(commands.run("check", "--json"))["values"]
    yield from (f"{name}={text}" for name, text in values.items())
    yield "\nkeys of config.json"
    yield from (f"{key}: {json.dumps(one.default, default=str)}" for key, one in InboxConfig.model_fields.items())


def landed(commands: Commands, world: World) -> Iterator[str]:
    """The past, by every pipeline, in both formats and on both sinks: what is left, and how it begins."""
    drop(good="k,a\n1,2\n", bad="a\n1\n")
    use(DATA_DIR="local", EXPORT_FORMAT="csv", **world.databases())
    for job in PULLED[:2]:
        commands.run("backfill", job, *SPAN, "--json")
    use(**world.everything())
    for job in PULLED:
        commands.run("backfill", job, *SPAN, "--json")
    commands.run("run", "csv_inbox", "--json")
    for folder in (Path("local"), Path("data"), INBOX):
        yield from left_in(folder)
    yield "\nGoogle Drive"
    for file in world.drive.state.files.matching(lambda file: file.is_binary):
        yield f"{file.name}  {file.mime_type}  properties: {', '.join(sorted(file.properties))}"
        yield from begun(file.name, file.content)
    yield "\nwarehouse: the first and the last row, without id and created_at"
    with closing(sqlite3.connect("data/dwh.db")) as database:
        for table in names_of_tables(database):
            if table not in ("headwater_migrations", "dwh_deleted_salt"):  # the salt is random
                yield from (f"{table}: {row}" for row in ends_of(database, table))


def left_in(folder: Path) -> Iterator[str]:
    """Each file, but for what depends on the file system or on the moment."""
    yield f"\n{folder}/"
    files = []
    for path in (each for each in folder.rglob("*") if each.is_file()):
        if ".db-" in path.name or ".headwater" in path.parts:
            continue
        name = STAMP.sub("<stamp>", str(path.relative_to(folder)))
        files.append([name, *(begun(name, path.read_bytes()) if path.suffix != ".db" else ())])
    yield from (line for file in sorted(files) for line in file)


def begun(name: str, content: bytes) -> Iterator[str]:
    """The header and the first row of a file, or the shape of a document."""
    if name.endswith(".parquet"):
        yield from columns_of(content)
    elif name.endswith(".gz"):
        yield from begun("", gzip.decompress(content))
    elif name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield f"    {member}"
                yield from begun(member, archive.read(member))
    elif name.endswith(".json"):
        yield from lines(Shapes().of([json.loads(content)]), indent="    ")
    else:
        begin = content.decode("utf-8", "replace").splitlines()[:2]
        yield from (f"    {LOGGED.sub('<instant> ', STAMP.sub('<stamp>', line))}" for line in begin)


def columns_of(content: bytes) -> Iterator[str]:
    from pyarrow import parquet

    with parquet.ParquetFile(io.BytesIO(content)) as file:
        for number, column in enumerate(file.schema):
            stored = file.metadata.row_group(0).column(number)
            yield f"    {column.name}: {column.physical_type} {column.logical_type} {stored.compression}"
        yield f"    metadata: {', '.join(sorted(key.decode() for key in file.metadata.metadata))}"
        yield f"    {json.dumps(file.read().slice(0, 1).to_pylist()[0], default=str)}"


def ends_of(database: sqlite3.Connection, table: str) -> Iterator[str]:
    for order in ("ASC", "DESC"):
        found = database.execute(f"SELECT * FROM {table} ORDER BY 1 {order} LIMIT 1")  # noqa: S608 - its own name
        names = [each[0] for each in found.description]
        for row in found:
            told = {name: value for name, value in zip(names, row, strict=True) if name not in ("id", "created_at")}
            yield json.dumps(told, ensure_ascii=False, default=bytes.hex)


def look(commands: Commands, world: World) -> None:
    """The present, then every command that looks, takes back, or refuses."""
    world.go_on(datetime.now(UTC) - timedelta(minutes=10))
    for job in PULLED:
        commands.run("run", job, "--json")
    drop(good="k,a\n1,3\n")
    commands.run("run", "csv_inbox", "--json")
    commands.run("verify", "influx_to_s3", *SPAN, "--all", "--json")
    commands.run("rewrite", "influx_to_s3", *SPAN, "--json")
    last = next(run for run in json.loads(commands.run("runs", "csv_inbox", "--json"))["runs"] if run["rows"])
    for more in ((), ("--yes",)):
        commands.run("undo", "csv_inbox", last["run_id"], *more, "--json")
    for job in ("csv_inbox", "influx_to_s3"):
        with closing(open_state("", Path("data"))) as state:
            lease = state.leases.acquire(job, "another", 60)
            assert lease is not None
            commands.run("run", job, "--json")
            state.leases.release(lease)
    drop(good="k,a\n1,4\n")
    (INBOX / "final_clusters_data.csv").write_text("other\n", encoding="utf-8")
    commands.run("run", "csv_inbox", "--json")
    for line in REFUSED:
        commands.run(*line)
    for command in ("runs", "status", "check"):
        commands.run(command, "--json")
    for job in ("influx_to_s3", "dynamo_to_drive", "csv_inbox"):  # soon due again
        commands.run("pause", job, "--json")
    commands.run("resume", "set_aside_sweep", "--json")
    commands.run("keys", "new", "grafana", "--scopes", "read", "--json")
    once(commands)


def once(commands: Commands) -> None:
    """What `demo --once` prints, of this world: its own takes too long."""
    with redirect_stdout(io.StringIO()) as out:
        one_off.once(build(load_settings(os.environ, None)), as_json=True)
    commands.documents["demo"] = [json.loads(out.getvalue())]


async def web() -> Mapping[str, Iterable[str]]:
    """The application, started once: its routes, what they answer, and the metrics."""
    service = build(load_settings(os.environ, None))
    apps = []

    async def noted(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await service.app(scope, receive, send)
        apps.append(scope.get("app"))

    async with (
        served(service.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=noted), base_url="http://localhost") as client,
    ):
        document = (await client.get("/openapi.json")).json()
        answers = [await client.request(call.method, call.path, **call.sent) for call in CALLS]
        answers.append(await verified(client))
        metrics = (await client.get("/metrics")).text
    routes = [*documented(document), *hidden(apps[-1])]
    return {"routes": routes, "answers": answered(answers), "metrics": series(metrics)}


async def verified(client: httpx.AsyncClient) -> httpx.Response:
    """The list of verifications, once one has come to its end."""
    await client.post("/ops/jobs/influx_to_s3/verify", json=FROM_TO)
    while True:
        answer = await client.get("/ops/verifications")
        if all(each["ended_at"] for each in answer.json()["verifications"]):
            return answer
        await asyncio.sleep(0.02)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[None]:
    """From the start of the application to its end."""
    orders: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    told: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan"}, orders.get, told.put))
    await orders.put({"type": "lifespan.startup"})
    await told.get()
    yield
    await orders.put({"type": "lifespan.shutdown"})
    await life


def answered(answers: Sequence[httpx.Response]) -> Iterator[str]:
    """Status, type and headers of each answer, and the shape of its body or how it begins."""
    shapes = Shapes()
    always = set.intersection(*(set(each.headers) for each in answers))
    yield f"headers of each answer: {' '.join(sorted(always))}"
    for answer in answers:
        kind = answer.headers.get("content-type", "")
        yield f"\n{answer.request.method} {answer.request.url.raw_path.decode()}"
        more = sorted(set(answer.headers) - always - {"content-length", "content-type"})
        yield "  ".join(filter(None, (str(answer.status_code), kind, " ".join(more))))
        if kind == "application/json":
            yield from lines(shapes.of([answer.json()]))
        elif kind == "application/x-ndjson":
            yield from lines(shapes.of([json.loads(line) for line in answer.text.splitlines()]))
        elif kind.startswith("text/csv"):
            yield answer.text.partition("\n")[0]
    yield ""
    yield from shapes.told_once()


def documented(document: Mapping[str, Any]) -> Iterator[str]:
    """The OpenAPI document: each route with its scope, its parameters, its body and its answers by status."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"\n{method.upper()} {path}  {scope_of(operation)}  {operation['operationId']}"
            yield from alike(
                (
                    f"{each['in']} {each['name']}{'?' * (not each.get('required'))}",
                    [f"  {inline(schema(each['schema']))}"],
                )
                for each in operation.get("parameters", ())
            )
            if "requestBody" in operation:
                yield from alike([("body", bodies(operation["requestBody"]))])
            yield from alike((status, bodies(answer)) for status, answer in sorted(operation["responses"].items()))
    yield ""
    for name, each in document["components"]["schemas"].items():
        yield from lines(schema(each), f"{name}: ")


def bodies(described: Mapping[str, Any]) -> Iterator[str]:
    """What a request or an answer holds, by media type."""
    for media, content in described.get("content", {}).items():
        yield from lines(schema(content.get("schema", {})), f"{media} ", "  ")


def alike(named: Iterable[tuple[str, Iterable[str]]]) -> Iterator[str]:
    """Those that are equal together: their names, and what they are."""
    same: dict[tuple[str, ...], list[str]] = {}
    for name, content in named:
        same.setdefault(tuple(content), []).append(name)
    for content, names in same.items():
        short = len(content) == 1
        yield f"  {' '.join(names)}{' '.join(content) if short else ''}"
        yield from (f"  {line}" for line in content if not short)


def hidden(app: Any) -> Iterator[str]:
    """Routes that the document leaves out."""
    yield "\nnot in the document"
    for route in iter_route_contexts(app.routes):
        if not route.include_in_schema:
            yield f"{','.join(sorted(route.methods or ()))} {route.path}  {scope_of(route.openapi_extra)}"


def scope_of(route: Mapping[str, Any] | None) -> str:
    """A route that names no scope is refused to everybody."""
    return str((route or {}).get("x-scope", "nobody"))


def series(text: str) -> Iterator[str]:
    """Each metric with its type and labels; then the values of the labels that are words of the interface."""
    labels: dict[str, list[str]] = {}
    values: dict[str, set[str]] = {}
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    for name, inner in re.findall(r"^(\w+)(?:{(.*)})? \S+$", text, re.MULTILINE):
        found = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', inner)
        labels[name] = [label for label, _ in found]
        for label, value in found:
            values.setdefault(label, set()).add(value)
    yield from (f"{name} {kind} {{{', '.join(labels[name])}}}" for name, kind in kinds.items())
    yield ""
    yield from (
        f"{label}: {', '.join(sorted(values[label]))}" for label in ("job", "outcome", "entry", "reason", "check")
    )


def tables_in_sqlite() -> Iterator[str]:
    """Each table with its columns (`!` not null, `*` key), and its indexes."""
    for path in ("data/state.db", "data/dwh.db"):
        yield f"\n{path}"
        with closing(sqlite3.connect(path)) as database:
            for table in names_of_tables(database):
                columns = {
                    name: f"{kind}{'!' * required}{'*' * bool(key)}{f' = {default}' if default is not None else ''}"
                    for _, name, kind, required, default, key in database.execute(f"PRAGMA table_info({table})")
                }
                yield from lines(columns, f"{table}: ")
                for _, index, unique, origin, *_ in sorted(database.execute(f"PRAGMA index_list({table})")):
                    of = ", ".join(str(row[2]) for row in database.execute(f"PRAGMA index_info({index})"))
                    yield f"    {'unique ' * unique}{index if origin == 'c' else origin} ({of})"


def names_of_tables(database: sqlite3.Connection) -> list[str]:
    found = database.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY 1"
    )
    return [name for (name,) in found]


COLUMNS = """
SELECT table_name, column_name, concat_ws(' ', data_type, CASE is_nullable WHEN 'NO' THEN 'not null' END,
    '= ' || column_default)
FROM information_schema.columns WHERE table_schema = 'public' ORDER BY table_name COLLATE "C", ordinal_position
"""
INDEXES = """
SELECT regexp_replace(indexdef, 'CREATE (.*)INDEX (.*) ON public.', '\\1\\2 on ')
FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname COLLATE "C"
"""


def tables_in_postgres(state: str, warehouse: str) -> Iterator[str]:
    """The same, of databases that were empty before `check`."""
    use(CHECKPOINT_DATABASE_URL=state, DWH_DATABASE_URL=warehouse, DATA_DIR="postgres")
    Commands().run("check", "--json")
    for title, url in (("state", state), ("warehouse", warehouse)):
        yield f"\n{title}"
        with psycopg.connect(url) as connection:
            for table, columns in groupby(connection.execute(COLUMNS), lambda row: row[0]):
                yield from lines({name: kind for _, name, kind in columns}, f"{table}: ")
            yield from (f"    {index}" for (index,) in connection.execute(INDEXES))


def spoken(commands: Commands) -> Iterator[str]:
    """How each command exits; then the documents of `--json`, of all calls of a command together."""
    yield from (HEX.sub("<run>", line) for line in commands.codes)
    shapes = Shapes()
    for command, documents in commands.documents.items():
        yield f"\n{command}"
        yield from lines(shapes.of(documents))
    yield ""
    yield from shapes.told_once()


def main(folder: Path, into: Path, *urls: str) -> None:
    """Write all snapshots into a folder."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    use()
    commands = Commands()
    with ExitStack() as running:
        world = World(running)
        told: dict[str, Iterable[str]] = {"help": list(helps(commands)), "variables": list(variables(commands))}
        told["objects"] = list(landed(commands, world))
        look(commands, world)
        told |= asyncio.run(web())
        told["tables-sqlite"] = list(tables_in_sqlite())
        world.consent(commands)
        if urls:
            told["tables-postgres"] = list(tables_in_postgres(*urls))
        use(PORT="eighty")
        commands.run("check")
    told["commands"] = spoken(commands)
    for name, text in told.items():
        (into / f"{name}.txt").write_text("\n".join(text).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), *sys.argv[3:])
