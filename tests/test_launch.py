"""What is shipped for launching, run as it is written on a machine apart; configs and devices alone are others.

That machine is made of namespaces: the commands take the ports and folders that they take by default, names of hosts
are what the manifests call them, and nothing can be reached from outside.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import stat
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_support import can_be_apart, machine
from here_support import scoring_here
from readme_support import fences

from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.store.history import read_history
from tokenbound.store.run import RunDirectory

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not can_be_apart(), reason="making namespaces needs root"),
    pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="jobs need the extra `cluster`"),
]

ROOT = Path(__file__).parents[1]
SCHEDULES = ROOT / "workflows" / "schedules"
LOOPBACK = {"0100007F", f"{'0' * 24}01000000", f"{'0' * 16}FFFF00000100007F"}
"""127.0.0.1, ::1 and the first in the clothes of the second, as `/proc/net/tcp` writes them."""
LISTENING = "0A"
Build = Callable[..., dict[str, Any]]


def write(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def with_config(command: str, named: str, config: Path) -> str:
    """A command with another config, on processors."""
    assert named in command
    return command.replace(named, str(config)).replace("how.device=cuda", "how.device=cpu")


def without_times(certificate: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in certificate.items() if name != "created_at"}


def alone(tree: dict[str, Any], output: Path) -> dict[str, Any]:
    """The certificate of a run in this process."""
    config = validate(RunConfig, {**tree, "how": {"output": str(output)}}, origin="test")
    with scoring_here():
        return without_times(json.loads(evaluate(config).model_dump_json()))


def certified(output: Path) -> dict[str, Any]:
    return without_times(json.loads((output / "certificate.json").read_text()))


def assert_nowhere(secret: str, *folders: Path) -> None:
    """No file below the folders holds it."""
    files = [path for folder in folders for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    assert {"config.yaml", "certificate.json", "dashboard.log"} <= {path.name for path in files}
    assert any(path.name.startswith("job-driver-") for path in files), "there is no log of the job"
    holding = [path for path in files if secret.encode() in path.read_bytes()]
    assert holding == []


PROBE = """
cat /proc/net/tcp /proc/net/tcp6 > "$HOME/sockets"
cat /proc/[0-9]*/cmdline > "$HOME/commands"
python -c 'import urllib.request as web; web.urlopen("http://127.0.0.1:8265/api/jobs/")' 2> "$HOME/refused" || true
"""
"""What a stranger on the machine sees."""


def refused(home: Path) -> bool:
    return "HTTP Error 401" in (home / "refused").read_text()


def test_the_two_commands_of_the_readme(run_tree: Build, tmp_path: Path, ray_session: None) -> None:
    tree, home = run_tree(), tmp_path / "home"
    (fence,) = (fence for fence in fences() if "\nray start --head" in fence.text)
    script = with_config(fence.text, "my-run.yaml", write(tree, tmp_path / "run.yaml"))
    with machine(home) as found:
        printed = found.run(script + PROBE)
        token = (home / ".ray" / "auth_token").read_text().strip()
        assert_nowhere(token, found.ray, tmp_path / "run", tmp_path / "prepared")
    assert certified(tmp_path / "run") == alone(tree, tmp_path / "alone")
    assert "bound" in printed
    assert len(token) >= 32
    assert not (home / ".ray" / "auth_token").stat().st_mode & 0o077, "others may read the token"
    assert token not in printed
    assert token.encode() not in (home / "commands").read_bytes()
    assert refused(home)
    sockets = [line.split() for line in (home / "sockets").read_text().splitlines()]
    listening = {words[1] for words in sockets if words[3] == LISTENING}
    assert listening
    assert {address.partition(":")[0] for address in listening} <= LOOPBACK


HEAD = "tokenbound-head-svc"
"""What the manifests call the head's machine."""
HEALTHY = f"""
until python -c 'import urllib.request as web; web.urlopen("http://{HEAD}:8265/api/gcs_healthz")' 2> /dev/null
do sleep 1; done
"""


def manifest(name: str) -> Any:
    return yaml.safe_load((SCHEDULES / name).read_text())


def start_parameters(group: dict[str, Any]) -> str:
    return shlex.join(f"--{name}={value}" for name, value in group["rayStartParams"].items())


def kuberay(spec: dict[str, Any], job: str, config: Path) -> str:
    """How KubeRay's container submits a RayJob: no working directory, so it runs in the image's."""
    entrypoint = with_config(spec["entrypoint"], "/configs/nightly.yaml", config)
    to = f"--address http://{HEAD}:8265"
    return f"""
if ! ray job status {to} {job} > /dev/null 2>&1
then ray job submit {to} --no-wait --submission-id {job} -- {entrypoint}; fi
ray job logs {to} --follow {job}
ray job status {to} {job} | grep succeeded
"""


def test_the_manifests_of_kubernetes(run_tree: Build, tmp_path: Path) -> None:
    """Three nights, one by each manifest, the last on a corpus that has grown.

    The last one's job brings a working directory. With a second node on the same disk such jobs were seen to break off
    while they loaded torch, so that cluster has one node.
    """
    corpus, home = tmp_path / "corpus", tmp_path / "home"
    tree = run_tree("nightly")
    shutil.copytree(tree["what"]["corpus"]["paths"][0], corpus)
    tree["what"]["corpus"]["paths"] = [str(corpus)]
    config = write(tree, tmp_path / "nightly.yaml")
    spec, night = manifest("rayjob.yaml")["spec"], manifest("raycronjob.yaml")["spec"]["jobTemplate"]
    (container,) = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    token = secrets.token_hex(32)
    environment = {item["name"]: item.get("value", token) for item in container["env"]}
    assert set(environment) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}, "what KubeRay gives every container"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    cluster = f"""
ray start --head {start_parameters(spec["rayClusterSpec"]["headGroupSpec"])} --dashboard-host=0.0.0.0 --block &
{HEALTHY}
ray start --address={HEAD}:6379 {start_parameters(workers)} --num-cpus=1 --block &
"""
    submit = with_config(shlex.join([*container["command"], *container["args"]]), "/configs/nightly.yaml", config)
    script = f"""
{cluster}
{kuberay(spec, "rayjob", config)}
{kuberay(night, "raycronjob", config)}
ray stop --force
ray start --head
{HEALTHY}
seq 2000 > {corpus}/zz.txt
{submit}
"""
    with machine(home, HEAD) as found:
        printed = found.run(script, environment)
        assert_nowhere(token, found.ray, tmp_path / "nightly", tmp_path / "prepared")
    assert token not in printed
    assert "nothing new" in printed
    assert [entry.segments for entry in read_history(RunDirectory(str(tmp_path / "nightly")))] == [1, 2]


def test_the_commands_of_the_cluster_file(run_tree: Build, tmp_path: Path, ray_session: None) -> None:
    """As `ray up` runs them on the head, whose `python` is not ours; and the README's command for a cloud's cluster."""
    tree, home = run_tree(), tmp_path / "home"
    found = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (home / ".ray").mkdir(parents=True)
    token = secrets.token_hex(32)
    (home / ".ray" / "auth_token").write_text(token)
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump({**found, "head_start_ray_commands": []}))
    (fence,) = (fence for fence in fences() if "\nray up cluster.yaml" in f"\n{fence.text}")
    (submit,) = (command for command in fence.commands if command[:3] == ["ray", "job", "submit"])
    nodes = Path("/home/ubuntu")
    limit = "ulimit -n 65536"
    start_head = found["head_start_ray_commands"]
    assert limit in start_head[-1]
    script = f"""
mount -t tmpfs none /home
mkdir -p {nodes}/tokenbound
ln -s {home}/.ray {home}/ray_bootstrap_config.yaml {nodes}
ln -s {ROOT}/* {nodes}/tokenbound
ln -s {Path(sys.prefix)} {nodes}/tokenbound/.venv
ours=$PATH
export HOME={nodes} PATH=/usr/sbin:/usr/bin:/sbin:/bin
{chr(10).join(f"({command})" for command in start_head)}
export PATH=$ours RAY_AUTH_MODE=token
{with_config(shlex.join(submit), "my-run.yaml", write(tree, tmp_path / "run.yaml"))}
"""
    with machine(home) as here:
        printed = here.run(script.replace(limit, "ulimit -n $(ulimit -Hn)"))  # this machine may allow fewer
        assert_nowhere(token, here.ray, tmp_path / "run", tmp_path / "prepared")
    assert token not in printed
    assert certified(tmp_path / "run") == alone(tree, tmp_path / "alone")
