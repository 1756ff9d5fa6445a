"""Encode a checkpoint: `python -m workflows.compress CHECKPOINT OUT [--method M]`, also as a Ray job."""

from tokenbound.cli import run_command

if __name__ == "__main__":
    run_command("compress")
