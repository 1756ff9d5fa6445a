"""What is shipped for clusters and schedules: Ray's schema, Kubernetes' for jobs and pods, ours for KubeRay."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import psutil
import pytest
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

ROOT = Path(__file__).parents[1]
SCHEDULES = ROOT / "workflows" / "schedules"
KUBERNETES = "1.37"
Text = Annotated[str, Field(min_length=1)]
Cron = Annotated[str, Field(pattern=r"^[\d*/,-]+( [\d*/,-]+){4}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def pod_template(template: dict[str, Any]) -> dict[str, Any]:
    """A template of pods, checked against Kubernetes' own schema."""
    named = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": template}
    kubernetes_validate.validate(named, KUBERNETES, strict=True)
    return template


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Annotated[dict[str, Any], AfterValidator(pod_template)]


class WorkerGroup(HeadGroup):
    groupName: Text
    replicas: int
    minReplicas: int
    maxReplicas: int


class AuthOptions(Strict):
    mode: Literal["token"]


class RayCluster(Strict):
    rayVersion: Text
    enableInTreeAutoscaling: Literal[True]
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: Text
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int
    rayClusterSpec: RayCluster


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")]


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayCronSpec(Strict):
    schedule: Cron
    jobTemplate: RayJobSpec


class RayCronJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Metadata
    spec: RayCronSpec


KUBERAY: TypeAdapter[Any] = TypeAdapter(Annotated[RayJob | RayCronJob, Field(discriminator="kind")])


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert "GPU" not in head["resources"]
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["max_workers"] > worker["min_workers"] == 0
    for node in (head, worker):
        assert "ubuntu" in node["node_config"]["ImageId"], "Ray's own choice of image has no Python that would do"
        assert "IamInstanceProfile" in node["node_config"], "Ray gives workers none, and so no storage"
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command.startswith("export RAY_AUTH_MODE=token && ")
        assert " && . .venv/bin/activate && " in command, "jobs would run with the system's Python"
        assert "0.0.0.0" not in command


def manifest(name: str) -> Any:
    return yaml.safe_load((SCHEDULES / name).read_text())


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_kuberay_manifests_have_the_fields_of_their_kinds(name: str) -> None:
    KUBERAY.validate_python(manifest(name))


def test_what_cluster_files_import_is_installed_with_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert yaml.safe_load((ROOT / "cluster.yaml").read_text())["provider"]["type"] == "aws"
    assert any(name.startswith("boto3") for name in extras["cluster"]), "`ray up` speaks to AWS through it"


def test_kubernetes_accepts_the_cron_job() -> None:
    tree = manifest("cronjob.yaml")
    kubernetes_validate.validate(tree, KUBERNETES, strict=True)
    assert tree["spec"]["concurrencyPolicy"] == "Forbid"
    assert tree["spec"]["schedule"] == manifest("raycronjob.yaml")["spec"]["schedule"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), 7),
        (("comand",), ["ray"]),
        (("resources", "requests", "cpu"), ["4"]),
        (("envFrom",), [{"secretReference": {"name": "tokenbound-storage"}}]),
    ],
)
def test_a_container_that_kubernetes_would_refuse_is_refused(path: tuple[str, ...], value: object) -> None:
    tree = manifest("rayjob.yaml")
    (place,) = tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        KUBERAY.validate_python(tree)


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "cronjob.yaml"])
def test_manifests_ask_for_a_token_and_hold_no_secret(name: str) -> None:
    assert "token" in str(manifest(name))
    assert not re.search(r"(?i)(secret_access_key|password)['\"]?: ['\"]?\w", (SCHEDULES / name).read_text())


def crontab_command() -> str:
    """What the shipped line has cron give to the shell."""
    (line,) = [text for text in (SCHEDULES / "crontab").read_text().splitlines() if not text.startswith("#")]
    *moments, command = line.split(maxsplit=5)
    assert " ".join(moments) == manifest("raycronjob.yaml")["spec"]["schedule"]
    return command


def under_cron(command: str, home: Path) -> subprocess.Popen[str]:
    """Start a command as cron does: in sh, with a nearly empty environment."""
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "LOGNAME": "somebody"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment
    )


def test_the_crontab_line_runs_under_cron(tmp_path: Path) -> None:
    place = tmp_path / "tokenbound" / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "tokenbound").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (place / "tokenbound").chmod(0o755)
    shown, _ = under_cron(crontab_command(), tmp_path).communicate(timeout=60)
    assert shown.split() == [
        str(tmp_path / "tokenbound"),
        "reevaluate",
        "nightly.yaml",
        "--quiet",
        "--fail-if-worse",
        "0.05",
    ]


def start_of(process: psutil.Process) -> set[str]:
    """Names of the processes that one has started and that are there still."""
    try:
        return {child.name() for child in process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


@pytest.mark.slow
def test_two_nights_under_cron(tmp_path: Path, run_tree: Callable[..., dict[str, Any]]) -> None:
    """The shipped line: the first night certifies, the second finds nothing new and starts nothing."""
    home = tmp_path / "tokenbound"
    home.mkdir()
    (home / ".venv").symlink_to(sys.prefix)
    (home / "nightly.yaml").write_text(yaml.safe_dump(run_tree("nightly")))
    found = []
    for _ in range(2):
        began, night, started = time.monotonic(), under_cron(crontab_command(), tmp_path), set[str]()
        while night.poll() is None:
            started |= start_of(psutil.Process(night.pid))
            time.sleep(0.05)
        shown, wrong = night.communicate()
        assert night.returncode == 0, wrong
        found.append((shown, started & {"raylet", "gcs_server"}, time.monotonic() - began))
    (first, there, long_s), (second, nothing, short_s) = found
    assert there == {"raylet", "gcs_server"}
    assert "history.html" in first
    assert second == "nothing new\n"
    assert nothing == set()
    assert short_s < long_s / 2


# --- images, workflows and what a repository's pages read --------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments, lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_images_hold_what_the_manifests_run(kind: str) -> None:
    found = instructions(ROOT / f"docker/Dockerfile.{kind}")
    assert {word for word, _ in found} <= {"FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "CMD"}
    copied = {source for word, rest in found if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied <= kept, "the build context lacks what is copied"
    torch = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch is not None
    assert any(f"torch=={torch.group(1)}" in rest for _, rest in found)
    assert ("USER", "ray") in found, "nothing in a cluster runs as root"


def test_workflows_and_templates_are_whole() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        tree = yaml.load(path.read_text(), yaml.BaseLoader)  # `on` stays a word
        assert tree.keys() >= ({"on", "jobs", "permissions"} if path.parent.name == "workflows" else {"name", "body"})
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert matrix["python-version"][0] == lowest
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        name
        for path in (ROOT / ".github").rglob("*")
        if path.is_file()
        for name in re.findall(r"\bmake (\w+)", path.read_text())
    }
    assert called <= targets


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
