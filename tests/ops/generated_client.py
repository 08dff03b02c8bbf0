"""`python generated_client.py URL KEY FOLDER`: every call of the client that was generated in FOLDER, tried once.

Prints one line of JSON for each: the call, its status, and what became of the answer.
"""

import inspect
import json
import pkgutil
import sys
from datetime import datetime
from importlib import import_module
from io import BytesIO
from typing import Any

URL, KEY, FOLDER = sys.argv[1:]
sys.path.insert(0, FOLDER)
client: Any = import_module("client")
File = import_module("client.types").File
BODIES: dict[str, dict[str, Any]] = {
    "write_mobile_devices": {"data": [{"device_id": "d1"}]},
    "write_permanent_user_properties": {"data": [{"ehr_id": 1}]},
    "sign_in": {"key": KEY},
    "ask": {"resource": "events", "date_since": "2026-02-09", "date_until": "2026-02-09"},
    "run_sql": {"sql": "SELECT count(*) AS rows FROM telemetry"},
    "write_": {"data": [{"uuid": "0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11"}]},
    "": {"from": "2026-02-07T00:00:00Z", "to": "2026-02-07T01:00:00Z"},
}
TEXTS = {"key": "notes/a.txt", "job": "shelf", "start": "20260201", "end": "20260201", "signature": "x", "name": "x"}


def given(name: str, parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """A value for each parameter that must be given, and the body."""
    found: dict[str, Any] = {}
    for each in parameters:
        kind = each.annotation
        if each.name == "body":
            models = [model for model in kind_of(kind) if hasattr(model, "from_dict")]
            if "file" in getattr(models[0] if models else None, "__annotations__", {}):
                fields = inspect.signature(models[0]).parameters.values()
                rest = {field.name: "x" for field in fields if field.default is inspect.Parameter.empty}
                found["body"] = models[0](**{**rest, "file": File(payload=BytesIO(b"abc"), file_name="a.txt")})
            elif models:
                body = next(body for start, body in BODIES.items() if name.startswith(start))
                found["body"] = models[0].from_dict(dict(body))
        elif each.name.rstrip("_") == "format":  # a default that is another one is no JSON to read
            formats = next(choice for choice in kind_of(kind) if hasattr(choice, "__members__"))
            found[each.name] = formats("json")
        elif each.default is inspect.Parameter.empty and each.name != "client":
            first = kind_of(kind)[0]
            choices = list(first) if hasattr(first, "__members__") else []
            value: Any = choices[0] if choices else datetime.fromisoformat("2026-02-07T00:00:00Z")
            found[each.name] = TEXTS.get(each.name, 1) if first in (str, int, float) else value
    return found


def kind_of(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


# Deleting last, so that others find what they ask for; signing out needs no answer of others.
names = sorted(
    (
        each.name
        for each in pkgutil.walk_packages(import_module("client.api").__path__, "client.api.")
        if not each.ispkg
    ),
    key=lambda name: ("delete" in name, not name.rpartition(".")[2].startswith(("upload", "write", "ask"))),
)
signed = client.AuthenticatedClient(base_url=URL, token=KEY, prefix="", auth_header_name="X-API-Key", timeout=60)
for name in names:
    module = import_module(name)
    short = name.rpartition(".")[2]
    call = inspect.signature(module.sync_detailed)
    answer = module.sync_detailed(client=signed, **given(short, list(call.parameters.values())))
    parsed = type(answer.parsed).__name__
    told = {"call": short, "status": answer.status_code, "parsed": parsed, "type": answer.headers.get("content-type")}
    sys.stdout.write(json.dumps(told) + "\n")
