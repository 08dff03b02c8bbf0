"""The files around the code agree with each other and with their documents: pins, container, Kubernetes, Railway."""

import json
import re
import shlex
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.amplitude import job as amplitude_job
from app.appmetrica import job as appmetrica_job
from app.config.environment import load_settings
from needs import absent

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
K8S_WORKERS = ROOT / "deploy" / "k8s-workers"
MANIFESTS = ("deployment", "service", "configmap", "secret.example", "pvc", "kustomization")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = re.sub(r" \\\n\s*", " ", (ROOT / "Dockerfile").read_text())


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((K8S / f"{name}.yaml").read_text())
    return loaded


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("deployment")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    only: dict[str, Any]
    (only,) = pod()["containers"]
    return only


def instructions(word: str) -> list[str]:
    return re.findall(rf"^{word} (.+)$", DOCKERFILE, re.MULTILINE)


def known_variables() -> str:
    example = ROOT / ".env.example"
    if not example.exists():
        absent(".env.example does not exist yet")
    return example.read_text()


def test_every_package_is_pinned_exactly() -> None:
    groups = PROJECT["dependency-groups"].values()
    extras = PROJECT["project"]["optional-dependencies"].values()
    direct = [*PROJECT["project"]["dependencies"], *(each for group in (*groups, *extras) for each in group)]
    others = PROJECT["tool"]["uv"]["constraint-dependencies"]
    assert others
    assert [each for each in (*direct, *others) if not re.fullmatch(r"[\w.\[\]-]+==[\w.]+( ; .+)?", each)] == []
    assert others == sorted(others)


def test_requirements_hold_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.txt").read_text()
    entries = re.sub(r" \\\n\s*", " ", text).splitlines()
    assert [entry for entry in entries if not re.match(r"[\w.\[\]-]+==\S+ .*--hash=sha256:[0-9a-f]{64}$", entry)] == []
    names = {re.split(r"[=\[]", each)[0] for each in PROJECT["project"]["dependencies"]}
    assert names <= {entry.split("==")[0] for entry in entries}


def test_the_container_copies_what_exists_and_what_the_ignore_file_lets_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]}
    assert copied == let_in
    assert {path for path in copied if not (ROOT / path).exists()} == set()


def test_the_container_starts_python_itself_so_that_signals_arrive() -> None:
    (command,) = instructions("CMD")
    assert json.loads(command) == ["python", "-m", "app"]
    assert not instructions("ENTRYPOINT")


def test_the_container_runs_without_root_and_needs_no_volume_line() -> None:
    assert instructions("USER") == ["10001:10001"]
    assert not instructions("VOLUME"), "Railway refuses images with VOLUME"


def test_the_container_listens_for_others_keeps_data_apart_and_holds_no_secret() -> None:
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert variables.items() >= {("HOST", "0.0.0.0"), ("DATA_DIR", "/data"), ("UV_COMPILE_BYTECODE", "1")}  # noqa: S104 - that is the point
    assert [name for name in variables if re.search("KEY|TOKEN|SECRET|PASSWORD", name)] == []


def test_the_containers_own_health_check_is_python_that_compiles() -> None:
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    program, flag, code = json.loads(check)
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")


def test_the_build_uses_the_uv_that_ci_uses() -> None:
    versions = set(re.findall(r"uv==([\d.]+)", DOCKERFILE + (ROOT / ".ci" / "run").read_text()))
    assert len(versions) == 1


def alert_rules() -> dict[str, str]:
    """Expression by name."""
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_every_alert_has_its_place_in_the_runbook() -> None:
    named = set(re.findall(r"Headwater[A-Z]\w+", (ROOT / "docs" / "runbook.md").read_text()))
    assert named == set(alert_rules())


@pytest.mark.parametrize(
    ("job", "alert", "due_after"),
    [
        ("amplitude", "HeadwaterLagAmplitude", amplitude_job.DUE_AFTER),
        ("appmetrica", "HeadwaterLagAppMetrica", appmetrica_job.DUE_AFTER),
    ],
)
def test_the_limit_of_a_pull_is_above_the_lag_that_it_has_by_nature(job: str, alert: str, due_after: timedelta) -> None:
    rules = alert_rules()
    interval_seconds = getattr(load_settings({}, None), job).interval_seconds
    by_nature = due_after.total_seconds() + 3600 + interval_seconds
    assert f'="{job}"' in rules[alert]
    assert by_nature + 15 * 60 < float(rules[alert].rpartition(">")[2])
    (others,) = re.findall(r"{(.+)}", rules["HeadwaterLag"])
    excluded = dict(re.findall(r'(\w+)!~"([^"]+)"', others))
    assert all(re.fullmatch(excluded[label], job) for label in ("job", "exported_job"))


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yaml").read_text())
    return loaded


def test_a_push_to_main_is_deployed_only_after_all_checks() -> None:
    checks, deploy = workflow("checks"), workflow("deploy")
    steps = checks["jobs"]["checks"]["steps"]
    assert [step["env"] for step in steps if step.get("run") == "bash .ci/run"] == [{"CI": "true"}]
    assert deploy["jobs"]["checks"] == {"uses": "./.github/workflows/checks.yaml"}
    assert [job["needs"] for name, job in deploy["jobs"].items() if name != "checks"] == ["checks"]
    assert "github.ref == 'refs/heads/main'" in deploy["jobs"]["railway"]["if"]
    # YAML 1.1 reads the key `on` as true
    assert "workflow_call" in checks[True]
    assert deploy[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}


def test_workflows_may_only_read_the_repository_and_take_secrets_by_name() -> None:
    for name in ("checks", "deploy"):
        assert workflow(name)["permissions"] == {"contents": "read"}
    steps = [step for job in workflow("deploy")["jobs"].values() for step in job.get("steps", ())]
    assert {value for step in steps for value in step.get("env", {}).values()} == {
        "${{ vars.RAILWAY_SERVICE }}",
        "${{ secrets.RAILWAY_TOKEN }}",
    }


def test_hooks_before_a_commit_are_programs_of_this_checkout() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {(hook["language"], hook["entry"].split()[0]) for hook in repos[0]["hooks"]} == {
        ("system", "uv"),
        ("system", "sh"),
    }


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest_is_one_yaml_document(name: str) -> None:
    assert {"apiVersion", "kind"} <= manifest(name).keys()


def test_the_kustomization_lists_every_manifest_but_the_example() -> None:
    listed = set(manifest("kustomization")["resources"])
    assert listed == {f"{name}.yaml" for name in MANIFESTS} - {"secret.example.yaml", "kustomization.yaml"}


def test_the_deployment_has_the_documented_resources_and_probes() -> None:
    assert container()["resources"] == {
        "requests": {"memory": "256Mi", "cpu": "250m"},
        "limits": {"memory": "512Mi", "cpu": "500m"},
    }
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    table = (ROOT / "docs" / "deploy" / "kubernetes.md").read_text()
    assert "256Mi requested, 512Mi at most" in table
    assert "250m requested, 500m at most" in table
    for name, probe in probes.items():
        rhythm = f"every {probe['periodSeconds']} s, {probe['failureThreshold']} times"
        assert f"{name} probe | `{probe['httpGet']['path']}` {rhythm}" in table


def test_one_pod_at_a_time_with_time_to_stop() -> None:
    spec = manifest("deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    grace_seconds = int(manifest("configmap")["data"]["SHUTDOWN_GRACE_SECONDS"])
    assert pod()["terminationGracePeriodSeconds"] == 35
    assert grace_seconds + 5 <= 35
    assert grace_seconds < int(tomllib.loads((ROOT / "railway.toml").read_text())["deploy"]["drainingSeconds"])


def test_the_pod_may_do_nothing_that_it_need_not() -> None:
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert pod()["automountServiceAccountToken"] is False


def test_a_read_only_root_leaves_room_for_data_and_temporary_files() -> None:
    assert {mount["mountPath"] for mount in container()["volumeMounts"]} == {"/data", "/tmp"}  # noqa: S108 - the pod's own
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_names_that_manifests_refer_to_are_the_ones_they_have() -> None:
    references = {next(iter(each)): next(iter(each.values()))["name"] for each in container()["envFrom"]}
    assert references == {
        "configMapRef": manifest("configmap")["metadata"]["name"],
        "secretRef": manifest("secret.example")["metadata"]["name"],
    }
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod()["volumes"] if "emptyDir" not in volume]
    assert claims == [manifest("pvc")["metadata"]["name"]]
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("service")["spec"]["selector"].items() <= labels.items()


def test_workers_differ_from_the_service_in_what_they_run_and_keep() -> None:
    worker = yaml.safe_load((K8S_WORKERS / "workers.yaml").read_text())["spec"]["template"]
    (inside,) = worker["spec"]["containers"]
    own = {"name", "command", "ports", "resources"}
    shared = {key: container()[key] for key in container().keys() - own}
    assert {key: inside[key] for key in inside.keys() - own} == json.loads(
        json.dumps(shared).replace('"port": "http"', '"port": "probes"')
    )
    assert inside["command"] == ["python", "-m", "app", "worker"]
    assert inside["resources"]["limits"]["memory"] == "512Mi"
    assert all("emptyDir" in volume for volume in worker["spec"]["volumes"])
    assert worker["spec"]["terminationGracePeriodSeconds"] == pod()["terminationGracePeriodSeconds"]
    # the Service must not send requests to workers
    assert not manifest("service")["spec"]["selector"].items() <= worker["metadata"]["labels"].items()
    overlay = yaml.safe_load((K8S_WORKERS / "kustomization.yaml").read_text())
    assert overlay["resources"] == ["../k8s", "workers.yaml"]
    assert overlay["images"] == manifest("kustomization")["images"]
    (patch,) = overlay["patches"]
    (change,) = yaml.safe_load(patch["patch"])
    assert load_settings({}, None).lease.engine == "embedded"
    assert (change["path"], change["value"]) == ("/data/SCALE_ENGINE", "procrastinate")


def test_the_example_of_the_secret_holds_placeholders_only() -> None:
    values = manifest("secret.example")["stringData"].values()
    assert [value for value in values if not re.fullmatch(r"<.+>", value)] == []


def test_every_variable_of_the_manifests_and_of_railway_is_known() -> None:
    known = known_variables()
    railway = (ROOT / ".railway" / "railway.ts").read_text()
    names = {
        *manifest("configmap")["data"],
        *manifest("secret.example")["stringData"],
        *re.findall(r"^ +([A-Z][A-Z0-9_]+): ", railway, re.MULTILINE),
    }
    own = {name for name in names if not name.startswith("RAILWAY_")}
    assert {name for name in own if not re.search(rf"\b{name}\b", known)} == set()


def test_railway_checks_liveness_and_uses_the_image() -> None:
    old = tomllib.loads((ROOT / "railway.toml").read_text())
    assert old["build"] == {"builder": "DOCKERFILE", "dockerfilePath": "Dockerfile"}
    assert old["deploy"]["healthcheckPath"] == "/health"
    assert 'healthcheck: "/health"' in (ROOT / ".railway" / "railway.ts").read_text()
    assert "2026-12-01" in (ROOT / "docs" / "deploy" / "railway.md").read_text()
