"""The `tokenbound` command: thin wrappers that parse, call, print, and exit with a code a scheduler understands."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenbound.errors import InputError, TokenboundError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Provable generalization bounds for language models, from every training token.",
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a config key, e.g. what.bound.delta=0.01.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tokenbound").setLevel(logging.WARNING if quiet else logging.INFO)
    if context.invoked_subcommand is None:
        Console().print(
            "[bold]tokenbound[/bold]: an upper bound on a language model's expected loss, from every training "
            "token.\n\n"
            "  tokenbound demo                 try it now: no network, no GPU, under two minutes\n"
            "  tokenbound evaluate CONFIG      certify your model on your corpus\n"
            "  tokenbound verify CERTIFICATE   check a certificate, yours or another's\n\n"
            "tokenbound --help lists everything else."
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    windows: Annotated[int | None, typer.Option(help="Windows to sample; 0 scores every one.", min=0)] = None,
) -> None:
    """Certify the shipped byte model on this Python's own standard library; offline."""
    from tokenbound.demo import DEMO_WINDOWS, demo_config

    count = DEMO_WINDOWS if windows is None else windows
    _evaluate_and_print(demo_config(str(output), windows=count or None), as_json=False)


@app.command()
def evaluate(config: Path, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score a corpus and write the certificate; run it again to resume."""
    from tokenbound.config import RunConfig, load_config

    _evaluate_and_print(load_config(RunConfig, config, overrides or []), as_json=as_json)


def _evaluate_and_print(config: object, *, as_json: bool) -> None:
    from tokenbound.config import RunConfig
    from tokenbound.engine.evaluate import evaluate as run_evaluation
    from tokenbound.report.terminal import certificate_view

    assert isinstance(config, RunConfig)
    paths: list[str] = []
    certificate = run_evaluation(config, on_certificate=lambda _, path: paths.append(path))
    if as_json:
        _print_json(certificate.model_dump(mode="json"))
        return
    console = Console()
    console.print(certificate_view(certificate))
    if config.what.corpus.source == "python-stdlib":
        console.print(
            "The standard library differs between Python builds, so your figures may differ from published ones."
        )
    console.print(f"certificate  {paths[0]}\ncheck it     tokenbound verify {paths[0]}", soft_wrap=True)


@app.command()
def verify(
    certificate: Annotated[str, typer.Argument(help="certificate.json")],
    losses: Annotated[str | None, typer.Option(help="Run directory; default beside the certificate.")] = None,
    artifact: Annotated[str | None, typer.Option(help="The artifact; default beside the certificate.")] = None,
) -> None:
    """Recompute a certificate from its losses and artifact; exit 0 only if it holds."""
    from tokenbound.certificate import verify_beside

    checked = verify_beside(certificate, losses=losses, artifact=artifact)
    Console().print(
        f"verified: {checked.num_scored_tokens:,} losses and {checked.artifact_bytes:,} artifact bytes give "
        f"{'no loss bound' if checked.bound_bits is None else f'{checked.bound_bits:.4f} bits/token'} "
        f"({checked.method}). That the corpus has these losses was not checked.",
        soft_wrap=True,
    )


@app.command()
def compress(
    checkpoint: str,
    out: Path,
    method: Annotated[str, typer.Option(help="lossless, rtn, ...")] = "rtn",
    options: Annotated[list[str] | None, typer.Option("--set", help="Option of the method, e.g. step=0.5.")] = None,
    as_json: AsJson = False,
) -> None:
    """Encode a checkpoint into an artifact and print what it costs."""
    from tokenbound.compression.artifact import encode_artifact
    from tokenbound.compression.inspection import inspect_artifact
    from tokenbound.compression.settings import parse_settings
    from tokenbound.models.checkpoint import read_checkpoint

    settings = parse_settings({"method": method, **_options(options or [])})
    loaded = read_checkpoint(checkpoint)
    data = encode_artifact(loaded.architecture, loaded.tensors, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data)
    report = inspect_artifact(data)
    if as_json:
        _print_json(report.to_dict())
    else:
        Console().print(
            f"{out}: {report.num_bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight, "
            f"C(h) = {report.code_length_bits:,} bits",
            soft_wrap=True,
        )


def _options(pairs: list[str]) -> dict[str, object]:
    import yaml

    found: dict[str, object] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"option {pair!r} must look like step=0.5")
        found[key] = yaml.safe_load(text)
    return found


def _print_json(tree: object) -> None:
    sys.stdout.write(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point: a user's error is one line on stderr and its own exit code."""
    try:
        app(standalone_mode=True)
    except TokenboundError as error:
        sys.stderr.write(f"tokenbound: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
