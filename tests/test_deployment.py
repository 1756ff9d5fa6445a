"""What is shipped for clusters and schedules: Ray's schema, Kubernetes' for jobs and pods, ours for KubeRay."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
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
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command.startswith("export RAY_AUTH_MODE=token && ")
        assert "0.0.0.0" not in command


def manifest(name: str) -> Any:
    return yaml.safe_load((SCHEDULES / name).read_text())


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_kuberay_manifests_have_the_fields_of_their_kinds(name: str) -> None:
    KUBERAY.validate_python(manifest(name))


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


def test_the_crontab_line_runs_under_cron(tmp_path: Path) -> None:
    """cron's environment is nearly empty, and the shell is sh."""
    (line,) = [text for text in (SCHEDULES / "crontab").read_text().splitlines() if not text.startswith("#")]
    minute, hour, *_, command = line.split(maxsplit=5)
    assert minute.isdigit()
    assert hour.isdigit()
    place = tmp_path / "tokenbound" / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "tokenbound").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (place / "tokenbound").chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "SHELL": "/bin/sh",
        "LOGNAME": os.environ.get("USER", ""),
    }
    shown = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert shown.split() == [
        str(tmp_path / "tokenbound"),
        "reevaluate",
        "nightly.yaml",
        "--quiet",
        "--fail-if-worse",
        "0.05",
    ]
