"""The local Ray session that the package starts."""

from __future__ import annotations

import subprocess
import sys

IDLE = """
import os, time, ray
from tokenbound.engine.cluster import ray_session

@ray.remote(num_cpus=1)
class Scorer:
    def ready(self):
        return True

@ray.remote(num_cpus=0)
def pid():
    return os.getpid()

with ray_session():
    scorers = [Scorer.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    ray.get([scorer.ready.remote() for scorer in scorers])
    before = ray.get(pid.remote())
    time.sleep(4)
    print("same" if before == ray.get(pid.remote()) else "another")
"""


def test_idle_task_processes_are_kept_beside_scorers() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["same"], done.stderr
