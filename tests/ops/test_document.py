"""The OpenAPI document promises what the routes do: schemathesis and a generated client go by it."""

import compileall
import json
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest

from app.web.auth import new_key
from daemon import Daemons
from explored import explore_demo


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_schemathesis_finds_no_fault_of_the_server_and_no_broken_promise_beside_every_outside_system(
    tmp_path: Path,
) -> None:
    # the warehouse and the objects have runs of their own
    explore_demo(tmp_path, "--exclude-path-regex", "^/(dwh|s3)/", examples=1, seed=1)


OVERRIDES = {
    **dict.fromkeys(("*/*", "application/zip", "application/vnd.apache.parquet"), "application/octet-stream"),
    **dict.fromkeys(("text/csv", "application/x-ndjson"), "application/octet-stream"),
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "application/octet-stream",
}
BY_DESIGN = {  # what was made up for the call is not there
    "dismiss_ops_problems_problem_id_dismiss_post": 404,
    "run_detail_ops_runs_run_id_get": 404,
    "run_log_ops_runs_run_id_log_get": 404,
    "set_aside_ops_runs_run_id_set_aside_get": 404,
    "set_aside_file_ops_runs_run_id_set_aside_file_get": 404,
    "windows_ops_map_windows_get": 422,
    "shared_s3_shared_get": 403,
    "shared_upload_s3_shared_post": 403,
}


@pytest.mark.slow
def test_a_generated_client_sends_the_key_and_understands_the_answers_of_every_route(
    daemons: Daemons, tmp_path: Path
) -> None:
    secret, line = new_key("client", "admin", bytes)
    daemon = daemons.start("shelf", API_KEYS=line)
    document = daemon.get("/openapi.json", {"X-API-Key": secret})
    (tmp_path / "openapi.json").write_text(document.text)
    (tmp_path / "config.json").write_text(json.dumps({"post_hooks": [], "content_type_overrides": OVERRIDES}))
    generator = str(Path(sys.executable).with_name("openapi-python-client"))
    arguments = ["--path", "openapi.json", "--config", "config.json", "--meta", "none", "--output-path", "client"]
    made = subprocess.run(
        [generator, "generate", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stdout + made.stderr
    assert compileall.compile_dir(tmp_path / "client", quiet=1)
    script = Path(__file__).with_name("generated_client.py")
    tried = subprocess.run(
        [sys.executable, str(script), daemon.url, secret, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert tried.returncode == 0, tried.stdout + tried.stderr
    answers = {each["call"]: each for each in map(json.loads, tried.stdout.splitlines())}
    documented = [operation for path in document.json["paths"].values() for operation in path.values()]
    assert len(answers) == len(documented)
    for name, answer in answers.items():
        refused = BY_DESIGN.get(name, 400 if name.startswith("erase_") else 0)  # to erase needs a filter
        assert answer["status"] == refused if refused else answer["status"] in range(200, 300), answer
        assert answer["parsed"] != "NoneType" or answer["status"] == 204, answer


MONITORED = {"/health", "/ready", "/metrics"}  # what asks for these may add parameters of its own


def test_every_answer_in_the_document_has_a_schema_and_an_example_and_every_route_says_which_key_and_parameters(
    daemons: Daemons,
) -> None:
    daemon = daemons.start("quick_jobs")
    document = daemon.get("/openapi.json").json
    assert set(document["components"]["securitySchemes"]) == {"ApiKey", "Bearer"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            is_open = operation["x-scope"] == "open"
            if method == "get":
                answer = daemon.get(f"{path.replace('{', '').replace('}', '')}?nosuch=1")
                assert ("nosuch" in answer.text) == (path not in MONITORED), (path, answer)
            assert operation["security"] == ([] if is_open else [{"ApiKey": []}, {"Bearer": []}]), (method, path)
            wanted = set() if is_open else {"401", "403", "429", "503"}
            assert wanted <= set(operation["responses"]), (method, path)
            for status, answer in operation["responses"].items():
                for media, content in answer.get("content", {}).items():
                    assert content["schema"], (method, path, status, media)
                    if media == "application/json":
                        schema = {**content["schema"], "components": document["components"]}
                        jsonschema_rs.validate(schema, content["example"])
