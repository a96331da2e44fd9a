"""What docker/ describes, judged without an engine: closed doors, no secrets, files that their own readers accept.

As in test_architecture.py, a rule turns a description into faults; ours has none, and offending ones show the bite.
Containers are really run by tests/end_to_end/test_containers.py.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

Document = dict[str, Any]

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this environment's programs come first
SCRIPTS = ("run.sh", "secrets.sh", "postgres-init.sh", "study.slurm")
SECRETS = (
    *("postgres_password", "mlflow_db_password", "optuna_db_password"),
    *("mlflow_admin_password", "mlflow_study_password", "mlflow_flask_key", "ray_token"),
)
SECRET_NAME = re.compile(r"(?i)password|passwd|token|secret|credential|(?<![a-z])key(?![a-z])")
IN_URL = re.compile(r"://[^/\s:@$]*:[^/\s@$]+@")  # user:password@host
# What of KubeRay's own fields is used; pods are held against Kubernetes' schema.
RAY_KINDS: dict[str, Document] = {
    "RayCluster": {
        "required": ["rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"],
        "properties": {
            "rayVersion": {"type": "string"},
            "authOptions": {
                "required": ["mode", "secretName"],
                "properties": {"mode": {"const": "token"}, "secretName": {"type": "string"}},
                "additionalProperties": False,
            },
            "enableInTreeAutoscaling": {"type": "boolean"},
            "autoscalerOptions": {
                "properties": {"idleTimeoutSeconds": {"type": "integer"}},
                "additionalProperties": False,
            },
            "headGroupSpec": {
                "required": ["rayStartParams", "template"],
                "properties": {"rayStartParams": {"$ref": "#/$defs/parameters"}, "template": {"type": "object"}},
                "additionalProperties": False,
            },
            "workerGroupSpecs": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                    "properties": {
                        "groupName": {"type": "string"},
                        **{
                            name: {"type": "integer", "minimum": 0}
                            for name in ("replicas", "minReplicas", "maxReplicas")
                        },
                        "rayStartParams": {"$ref": "#/$defs/parameters"},
                        "template": {"type": "object"},
                    },
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
        "$defs": {"parameters": {"type": "object", "additionalProperties": {"type": "string"}}},
    },
    "RayJob": {
        "required": ["clusterSelector", "entrypoint", "submissionMode", "submitterPodTemplate"],
        "properties": {
            "clusterSelector": {"required": ["ray.io/cluster"]},
            "entrypoint": {"type": "string"},
            "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
            "submitterPodTemplate": {"type": "object"},
        },
        "additionalProperties": False,
    },
}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, **options
    )


def program(name: str) -> str:
    """A program that comes with the extra `dev`."""
    found = shutil.which(name, path=PATH)
    assert found is not None, f"{name} is missing: run `make setup`"
    return found


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(__file__).resolve().parents[2] / "docker"


@pytest.fixture
def compose(folder: Path) -> Document:
    document: Document = yaml.safe_load((folder / "compose.yaml").read_text())
    return document


@pytest.fixture
def kuberay(folder: Path) -> list[Document]:
    return list(yaml.safe_load_all((folder / "kuberay.yaml").read_text()))


# --- rules


def compose_faults(document: Document) -> list[str]:
    """Doors that are open, secrets that are written down, services whose health nobody knows or that run as root."""
    faults = []
    for name, service in document["services"].items():
        ports = [str(port) for port in service.get("ports", [])]
        faults += [f"{name}: publishes {p}; begin with 127.0.0.1:" for p in ports if not p.startswith("127.0.0.1:")]
        if service.get("network_mode") == "host":
            faults.append(f"{name}: shares this machine's network")
        if not service.get("healthcheck", {}).get("test") or service["healthcheck"].get("disable"):
            faults.append(f"{name}: has no health check")
        if "ALL" not in service.get("cap_drop", []) or service.get("privileged"):
            faults.append(f"{name}: keeps rights that it does not need; cap_drop: [ALL], not privileged")
        ours = service["image"].startswith("${SPFT_IMAGE")  # its own user is the Dockerfile's
        if service.get("user", "1000" if ours else "root").partition(":")[0] in {"root", "0"}:
            faults.append(f"{name}: runs as root; name a user")
        if service.get("restart") == "always":
            faults.append(f"{name}: comes back after it was ended")
        faults += [f"{name}: {fault}" for fault in secret_literals(service)]
    for name, secret in document.get("secrets", {}).items():
        if not re.match(r"\$\{SPFT_SECRETS:\?", secret.get("file", "")):
            faults.append(f"secrets.{name}: has to come from the folder SPFT_SECRETS, and be refused where it is unset")
    return faults


def secret_literals(service: Document) -> list[str]:
    """Values of variables that are secrets, and passwords in addresses."""
    environment = service.get("environment", {})
    if isinstance(environment, list):
        environment = dict(pair.split("=", 1) for pair in environment)
    faults = [
        f"{variable} is written down"
        for variable, value in environment.items()
        if SECRET_NAME.search(variable) and not variable.endswith(("_FILE", "_PATH")) and value
    ]
    return faults + [f"a password in an address: {text}" for text in texts(service) if IN_URL.search(text)]


def texts(value: Any) -> Iterator[str]:
    """All texts in a document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*texts(key), *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def dockerfile_faults(text: str) -> list[str]:
    """An image that runs as root, tells nothing of its health, or holds a secret."""
    instructions = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    faults = []
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    arguments = dict(re.findall(r"(?m)^ARG (\w+)=(\S+)", text))
    user = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), users[-1]) if users else "0"
    if not re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", user):
        faults.append(f"runs as {user}: the last USER has to be a number other than 0, which Kubernetes can check")
    if not any(line.startswith("HEALTHCHECK ") and "NONE" not in line for line in instructions):
        faults.append("has no HEALTHCHECK")
    for line in instructions:
        if re.match(r"(ENV|ARG) ", line) and SECRET_NAME.search(line):
            faults.append(f"a secret would stay in the image: {line}")
        if re.search(r"https?://", line):
            faults.append(f"names a host: {line}")
        if line.startswith("ADD "):
            faults.append(f"ADD fetches and unpacks; use COPY: {line}")
    return faults


def pod_faults(name: str, template: Document) -> list[str]:
    """A pod template as Kubernetes' own schema and the restricted security standard see it."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"} | template.get("metadata", {})}
    faults = manifest_faults(name, pod | {"spec": template["spec"]})
    if template["spec"].get("securityContext", {}).get("runAsNonRoot") is not True:
        faults.append(f"{name}: may run as root")
    if template["spec"].get("hostNetwork"):
        faults.append(f"{name}: shares its node's network")
    for container in template["spec"]["containers"]:
        closed = container.get("securityContext", {})
        if closed.get("allowPrivilegeEscalation") is not False or closed.get("capabilities") != {"drop": ["ALL"]}:
            faults.append(f"{name}: {container['name']} keeps rights that it does not need")
        if not container.get("resources", {}).get("limits", {}).get("memory"):
            faults.append(f"{name}: {container['name']} has no limit of memory")
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]) and "value" in variable:
                faults.append(f"{name}: {variable['name']} is written down")
    return faults


def manifest_faults(name: str, manifest: Document) -> list[str]:
    """What Kubernetes would refuse in a manifest of one of its own kinds."""
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [f"{name}: {error}"]
    return []


def kuberay_faults(documents: list[Document]) -> list[str]:
    """Faults of all manifests of a file for KubeRay."""
    faults = []
    for document in documents:
        kind, spec = document["kind"], document["spec"]
        if kind not in RAY_KINDS:
            faults += manifest_faults(kind, document)
            continue
        for error in jsonschema.Draft202012Validator(RAY_KINDS[kind]).iter_errors(spec):
            faults.append(f"{kind}: {error.json_path}: {error.message}")
        templates = [spec.get("submitterPodTemplate"), spec.get("headGroupSpec", {}).get("template")]
        templates += [group.get("template") for group in spec.get("workerGroupSpecs", [])]
        for template in filter(None, templates):
            faults += pod_faults(kind, template)
    if not {"Secret"}.isdisjoint(document["kind"] for document in documents):
        faults.append("a Secret is written down; name the command that makes it")
    return faults


# --- ours keep them


def test_the_stack_has_closed_doors_and_no_secrets(compose: Document) -> None:
    assert compose_faults(compose) == []
    assert set(compose["secrets"]) == set(SECRETS)


def test_everything_that_a_service_names_is_declared(compose: Document) -> None:
    for name, service in compose["services"].items():
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        assert set(service.get("depends_on", {})) <= set(compose["services"]), name
        for volume in service.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
            assert source.startswith("./") or source in compose["volumes"], (name, volume)


@pytest.mark.parametrize("secrets", [True, False])
def test_compose_reads_the_file_and_refuses_it_without_secrets(folder: Path, tmp_path: Path, secrets: bool) -> None:
    program = composing()
    if program is None:
        pytest.skip("no docker compose here")
    environment = {"PATH": os.environ["PATH"]} | ({"SPFT_SECRETS": str(tmp_path)} if secrets else {})
    read = run(*program, "--file", folder / "compose.yaml", "config", env=environment)
    assert (read.returncode == 0) is secrets, read.stderr
    assert secrets or "SPFT_SECRETS" in read.stderr or "docs/cluster.md" in read.stderr


def test_the_image_runs_as_nobody_special_and_tells_its_health(folder: Path) -> None:
    assert dockerfile_faults((folder / "Dockerfile").read_text()) == []


def test_hadolint_finds_nothing(folder: Path) -> None:
    found = run(program("hadolint"), folder / "Dockerfile")
    assert found.returncode == 0, found.stdout


def test_shellcheck_finds_nothing(folder: Path) -> None:
    found = run(program("shellcheck"), *(folder / script for script in SCRIPTS))
    assert found.returncode == 0, found.stdout


def test_what_is_copied_into_the_image_is_there_and_let_through(folder: Path) -> None:
    lines = (folder.parent / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # all but what is named
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert all((folder.parent / name).exists() for name in let_through)
    copied = [
        line.split()[1:-1]
        for line in (folder / "Dockerfile").read_text().splitlines()
        if re.match("COPY (?!--from)", line)
    ]
    names = {name for line in copied for name in line}
    assert names <= let_through | {"docker"}
    assert {"study", "trainables", "search_spaces", "analysis"} <= names
    assert not {"tests", "outputs", ".git", "docker", "docker/secrets"} & let_through


def test_the_cluster_launcher_takes_its_file(folder: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((folder / "ray-cluster.yaml").read_text())
    prepared = prepare_config(given)
    validate_config(prepared)  # against ray/autoscaler/ray-schema.json
    assert "--env=RAY_AUTH_MODE=token" in given["docker"]["run_options"]
    [path] = [o for o in given["docker"]["run_options"] if o.startswith("--env=RAY_AUTH_TOKEN_PATH=")]
    assert given["file_mounts"][path.rpartition("=")[2]] == "docker/secrets/ray_token"
    [head] = [command for command in given["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head


def test_the_cluster_launcher_refuses_a_misspelt_file(folder: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((folder / "ray-cluster.yaml").read_text())
    given["dokcer"] = given.pop("docker")
    with pytest.raises(jsonschema.ValidationError, match="dokcer"):
        validate_config(prepare_config(given))


def test_kubernetes_takes_the_manifests(kuberay: list[Document]) -> None:
    assert [document["kind"] for document in kuberay][-2:] == ["RayCluster", "RayJob"]
    assert kuberay_faults(kuberay) == []


def test_kubernetes_runs_the_ray_that_is_locked(folder: Path, kuberay: list[Document]) -> None:
    [locked] = re.findall(r"(?m)^ray==(\S+)$", (folder.parent / "requirements.lock").read_text())
    assert [d["spec"]["rayVersion"] for d in kuberay if d["kind"] == "RayCluster"] == [locked]


def test_pods_that_may_talk_to_the_cluster_carry_the_label_of_its_policy(kuberay: list[Document]) -> None:
    [policy] = [document for document in kuberay if document["kind"] == "NetworkPolicy"]
    label = policy["spec"]["podSelector"]["matchLabels"]
    [cluster] = [document["spec"] for document in kuberay if document["kind"] == "RayCluster"]
    [job] = [document["spec"] for document in kuberay if document["kind"] == "RayJob"]
    templates = [cluster["headGroupSpec"]["template"], job["submitterPodTemplate"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    assert all(label.items() <= template["metadata"]["labels"].items() for template in templates)


# --- scripts, as far as they run without containers


def test_secrets_are_drawn_once_into_a_folder_for_its_owner_alone(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "secrets"
    assert run(folder / "secrets.sh", place).returncode == 0
    drawn = {file.name: file.read_text() for file in place.iterdir()}
    assert set(drawn) == set(SECRETS)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in drawn.values())
    assert len(set(drawn.values())) == len(drawn)

    (place / "ray_token").unlink()
    assert run(folder / "secrets.sh", place).returncode == 0
    again = {file.name: file.read_text() for file in place.iterdir()}
    assert [name for name in SECRETS if again[name] != drawn[name]] == ["ray_token"]


def test_no_secret_can_be_committed(folder: Path) -> None:
    ignored = run("git", "-c", "safe.directory=*", "check-ignore", "docker/secrets/ray_token", cwd=folder.parent)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["head"], "ray_token"),
        (["worker"], "ray_token"),
        (["mlflow"], "mlflow_db_password"),
        (["mlflow-users"], "mlflow_admin_password"),
        (["study", "ablation"], "mlflow_study_password"),
        (["study", "status", "ablation"], "mlflow_study_password"),
    ],
)
def test_a_container_without_its_secret_does_not_start(
    folder: Path, tmp_path: Path, arguments: list[str], missing: str
) -> None:
    for name in SECRETS:
        (tmp_path / name).write_text("" if name == missing else "drawn")
    said = run(folder / "run.sh", *arguments, env=role_environment(tmp_path))
    assert said.returncode == 2
    assert f"{tmp_path}/{missing} is missing or empty: mount the secret {missing}" in said.stderr


def test_a_role_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    said = run(folder / "run.sh", "haed", env=role_environment(tmp_path))
    assert said.returncode == 2
    assert "haed is no role; expected head, worker," in said.stderr


def test_commands_that_train_nothing_need_no_cluster(folder: Path, tmp_path: Path) -> None:
    said = run(folder / "run.sh", "study", "list", env=role_environment(tmp_path))
    assert said.returncode == 0, said.stderr
    assert "ablation" in said.stdout


def test_a_node_whose_ports_do_not_answer_is_not_healthy(folder: Path, tmp_path: Path) -> None:
    environment = role_environment(tmp_path)
    Path(environment["ROLE_FILE"]).write_text("head\n")
    assert run(folder / "run.sh", "health", env=environment | {"NODE_PORT": "9"}).returncode != 0
    Path(environment["ROLE_FILE"]).write_text("study\n")
    assert run(folder / "run.sh", "health", env=environment).returncode == 0


def role_environment(tmp_path: Path) -> dict[str, str]:
    """Where run.sh finds the secrets and this Python."""
    return {"PATH": PATH, "SECRETS": str(tmp_path), "ROLE_FILE": str(tmp_path / "role"), "HOME": str(tmp_path)}


def composing() -> list[str] | None:
    """The program that reads compose files, as the Makefile finds it."""
    if shutil.which("docker") and run("docker", "compose", "version").returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


# --- make


ENGINE = """#!/bin/sh
echo "$SPFT_SECRETS $(basename "$0") $*" >> "$LOG"
case "$1" in compose) [ "$2" = version ] && echo v2;; esac
exit 0
"""


def made(root: Path, tmp_path: Path, *arguments: str) -> list[str]:
    """What `make` asks the engine for, in a copy that holds only what it needs; a stand-in notes it."""
    tmp_path.mkdir(exist_ok=True)
    for name in ("Makefile", "docker"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    shutil.rmtree(tmp_path / "docker" / "secrets", ignore_errors=True)
    engine = tmp_path / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    log = tmp_path / "log"
    environment = {"PATH": os.environ["PATH"], "LOG": str(log)}
    said = run("make", *arguments, f"DOCKER={engine}", cwd=tmp_path, env=environment)
    assert said.returncode == 0, said.stderr
    return [line for line in log.read_text().splitlines() if "compose version" not in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_up_builds_draws_secrets_and_starts_as_many_workers_as_asked_for(root: Path, tmp_path: Path) -> None:
    build, up = made(root, tmp_path, "up", "NODES=3", "TORCH_INDEX=file:///wheels")
    assert "build --file docker/Dockerfile" in build and "--build-arg TORCH_INDEX=file:///wheels" in build
    assert up.startswith(f"{tmp_path}/docker/secrets engine compose ")
    assert up.endswith("--project-name spft up --detach --scale worker=3")
    assert stat.S_IMODE((tmp_path / "docker" / "secrets").stat().st_mode) == 0o700


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_up_with_gpus_starts_the_worker_that_has_them(root: Path, tmp_path: Path) -> None:
    _, up = made(root, tmp_path, "up", "GPU=1")
    assert up.endswith("--profile gpu up --detach --scale worker=0 --scale worker-gpu=1")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_the_main_study_and_ends_the_stack(root: Path, tmp_path: Path) -> None:
    [study] = made(root, tmp_path / "a", "cluster-ablation", "ARGS=--smoke")
    assert re.search(r" run --rm (-T )?study study ablation --smoke$", study)
    [down] = made(root, tmp_path / "b", "down")
    assert down.endswith("--project-name spft down")


# --- the rules bite


@pytest.mark.parametrize(
    ("service", "change", "fault"),
    [
        ("mlflow", {"ports": ["5000:5000"]}, "publishes 5000:5000"),
        ("mlflow", {"ports": ["0.0.0.0:5000:5000"]}, "publishes 0.0.0.0:5000:5000"),
        ("head", {"network_mode": "host"}, "shares this machine's network"),
        ("worker", {"healthcheck": {"disable": True}}, "has no health check"),
        ("worker", {"privileged": True}, "keeps rights"),
        ("worker", {"user": "0:0"}, "runs as root"),
        ("postgres", {"user": "root"}, "runs as root"),
        ("postgres", {"environment": {"POSTGRES_PASSWORD": "postgres"}}, "POSTGRES_PASSWORD is written down"),
        ("mlflow", {"environment": ["MLFLOW_FLASK_SERVER_SECRET_KEY=x"]}, "MLFLOW_FLASK_SERVER_SECRET_KEY is written"),
        ("mlflow", {"command": ["mlflow", "postgresql://mlflow:pw@postgres/mlflow"]}, "a password in an address"),
    ],
)
def test_an_open_door_or_a_written_secret_is_found(
    compose: Document, service: str, change: Document, fault: str
) -> None:
    compose["services"][service] |= change
    [found] = compose_faults(compose)
    assert found.startswith(f"{service}: {fault}")


@pytest.mark.parametrize("file", ["./ray_token", "${SPFT_SECRETS}/ray_token", "${SPFT_SECRETS:-.}/ray_token"])
def test_a_secret_that_may_silently_be_missing_is_found(compose: Document, file: str) -> None:
    compose["secrets"]["ray_token"] = {"file": file}
    [found] = compose_faults(compose)
    assert found.startswith("secrets.ray_token: ")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER ${UID}:${UID}", "", "runs as 0"),
        ("USER ${UID}:${UID}", "USER spft", "runs as spft"),
        ("ARG UID=1000", "ARG UID=0", "runs as 0:0"),
        ("HEALTHCHECK", "LABEL x=", "has no HEALTHCHECK"),
        ("ARG UID=1000", "ARG UID=1000\nENV RAY_AUTH_TOKEN=abc", "a secret would stay in the image"),
        ("ARG UID=1000", "ARG UID=1000\nRUN pip install https://x.org/a.whl", "names a host"),
        ("ARG UID=1000", "ARG UID=1000\nADD a.tar.gz /", "ADD fetches"),
    ],
)
def test_an_image_that_is_root_sick_or_talkative_is_found(folder: Path, old: str, new: str, fault: str) -> None:
    text = (folder / "Dockerfile").read_text()
    assert old in text
    [found] = dockerfile_faults(text.replace(old, new, 1))
    assert found.startswith(fault)


def test_faults_of_manifests_are_found(kuberay: list[Document]) -> None:
    claim, cluster = kuberay[0], kuberay[-2]["spec"]
    claim["spec"]["accesModes"] = claim["spec"].pop("accessModes")
    cluster["authOptions"]["mode"] = "disabled"
    head, worker = cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]
    head["spec"] = head["spec"] | {"securityContext": {}}
    head["spec"]["containers"][0]["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"})
    worker["spec"]["containers"][0] |= {"resources": {"limits": {"cpu": "1"}}, "imagePullPolice": "Always"}
    kuberay.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "spec": {}})
    found = "\n".join(kuberay_faults(kuberay))
    for fault in (
        "accesModes",
        "$.authOptions.mode: 'token' was expected",
        "RayCluster: may run as root",
        "RAY_AUTH_TOKEN is written down",
        "ray-worker has no limit of memory",
        "imagePullPolice",
        "a Secret is written down",
    ):
        assert fault in found, found
