"""The nightly job: `python -m workflows.reevaluate CONFIG [--set a.b=c]...`, also as a Ray job."""

from tokenbound.cli import run_command

if __name__ == "__main__":
    run_command("reevaluate")
