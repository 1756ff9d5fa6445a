"""Evaluate a model on a corpus: `python -m workflows.evaluate CONFIG [--set a.b=c]...`, also as a Ray job."""

from tokenbound.cli import run_command

if __name__ == "__main__":
    run_command("evaluate")
