"""The `tokenbound` command: thin wrappers that parse, call, print, and exit with a code a scheduler understands."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.measure import Measurement
from typer.core import TyperGroup

from tokenbound.compression.methods import built_in_methods
from tokenbound.errors import InputError, StoppedError, TokenboundError, disk_problem
from tokenbound.signals import first_signal
from tokenbound.store.uri import base_name, join, split
from tokenbound.visible import VisibleFormatter, console, visible, visible_json

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from tokenbound.certificate.record import CertificateRecord
    from tokenbound.compression.methods import CompressionMethod
    from tokenbound.report.sweep_report import SweepRow
    from tokenbound.store.history import HistoryEntry
    from tokenbound.store.run import RunDirectory

RESUMABLE = {"compress", "demo", "evaluate", "plan", "pretrain", "reevaluate", "sweep"}
"""Commands that keep what they have done: the same command goes on from there."""


class _Commands(TyperGroup):
    """The commands; SIGINT and SIGTERM end one in order."""

    def invoke(self, ctx: Any) -> object:
        """Run the command that was asked for.

        Raises:
            StoppedError: a signal asked it to end.
        """
        with first_signal() as received:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                number = received[0] if received else signal.SIGINT
                raise StoppedError(number, resumable=ctx.invoked_subcommand in RESUMABLE) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Provable generalization bounds for language models, from every training token.",
)


def _override(example: str) -> Any:
    """The option that overrides keys of a config, with an example that its config has."""
    return typer.Option("--set", help=f"Override a config key, e.g. {example}.")


RunOverrides = Annotated[list[str] | None, _override("what.bound.delta=0.01")]
PretrainOverrides = Annotated[list[str] | None, _override("what.training.tokens=1000000")]
SweepOverrides = Annotated[list[str] | None, _override("how.parallel=2")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file; its keys are described in tokenbound/config and tokenbound/corpus/sources/fields.py.",
    ),
]


NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn at every import of what they were built without; nothing that a run depends on."""


def _log_to_stderr() -> None:
    """Show this package's own progress, one line with the time each; other packages keep to their own ways."""
    ours = logging.getLogger("tokenbound")
    for old in [handler for handler in ours.handlers if isinstance(handler, logging.StreamHandler)]:
        ours.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours.addHandler(handler)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _silence(quiet: bool) -> bool:
    if quiet:
        logging.getLogger("tokenbound").setLevel(logging.WARNING)
        _hide_bars()
    return quiet


def _hide_bars() -> None:
    """Switch off the progress bars of Hugging Face's packages, which read this when they are imported."""
    for package in ("HUB", "DATASETS"):  # transformers asks the hub's
        os.environ.setdefault(f"HF_{package}_DISABLE_PROGRESS_BARS", "1")


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_silence, help="Only results and errors.")]
"""Accepted before a command and after those that report progress."""


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        sys.stdout.write(f"tokenbound {metadata.version('tokenbound')}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _log_to_stderr()
    logging.getLogger("tokenbound").setLevel(logging.INFO)
    _silence(quiet)
    if not sys.stderr.isatty():
        _hide_bars()
    if context.invoked_subcommand is None:
        console(markup=True).print(
            "[bold]tokenbound[/bold]: an upper bound on a language model's expected loss, from every training "
            "token.\n\n"
            "  tokenbound demo                 try it now: no network, no GPU, two minutes\n"
            "  tokenbound evaluate CONFIG      certify your model on your corpus\n"
            "  tokenbound verify CERTIFICATE   check a certificate, yours or another's\n\n"
            "tokenbound --help lists everything else."
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    windows: Annotated[
        int | None, typer.Option(help="Windows to sample, more than 256; 0 scores every one.", min=0)
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Certify the shipped byte model on this Python's own standard library; offline."""
    from tokenbound.demo import DEMO_WINDOWS, demo_config

    count = DEMO_WINDOWS if windows is None else windows
    _evaluate_and_print(demo_config(str(output), windows=count or None), as_json=as_json)


@app.command()
def evaluate(config: ConfigFile, overrides: RunOverrides = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Score a corpus and write the certificate; run it again to resume."""
    from tokenbound.config.run import RunConfig, load_config

    _evaluate_and_print(load_config(RunConfig, config, overrides or []), as_json=as_json)


def _evaluate_and_print(config: object, *, as_json: bool) -> None:
    from tokenbound.config.run import RunConfig
    from tokenbound.engine.evaluate.run import evaluate as run_evaluation
    from tokenbound.report.terminal import certificate_view

    assert isinstance(config, RunConfig)
    paths: list[str] = []
    certificate = run_evaluation(config, on_certificate=lambda _, path: paths.append(path))
    if as_json:
        _print_json(certificate.model_dump(mode="json"))
        return
    screen = console()
    screen.print(certificate_view(certificate))
    if remark := config.what.corpus.reader().remark:
        screen.print(remark)
    shown = _near(paths[0])
    folder, name = split(shown)
    page = join(folder, f"{name.replace('certificate', 'report').removesuffix('.json')}.html")
    check = f"tokenbound verify {shlex.quote(shown)}"
    screen.print(f"certificate  {shown}\nreport       {page}\ncheck it     {check}", soft_wrap=True)


def _near(path: str) -> str:
    """A path as one would type it: relative where it lies below the working directory."""
    place = Path(path)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else path


def _certificate_path(name: str) -> str:
    """A certificate's file, given it or its run directory."""
    from tokenbound.store.run import CERTIFICATE

    return name if base_name(name).endswith(".json") else join(name, CERTIFICATE)


@app.command()
def verify(
    certificate: Annotated[str, typer.Argument(help="certificate.json, or the run directory that holds it.")],
    losses: Annotated[str | None, typer.Option(help="Run directory; default beside the certificate.")] = None,
    artifact: Annotated[str | None, typer.Option(help="The artifact; default beside the certificate.")] = None,
    rescore: Annotated[
        int, typer.Option(help="Re-score this many randomly chosen windows (more than there are: all).", min=0)
    ] = 0,
    corpus: Annotated[
        str | None,
        typer.Option(help="Run config that defines the corpus [default: config.yaml in the run directory]."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of a delta, for --rescore; default where the run config says.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draw of --rescore, to repeat a check; default unpredictable.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Also check the certificate's signature by this Ed25519 public key (PEM).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute a certificate from its losses and artifact; exit 0 only if it holds.

    What could not be checked is listed by name.
    """
    from tokenbound.certificate.verify import verify_beside
    from tokenbound.report.words import unchecked, verified_sentence

    if key is not None:
        from tokenbound.certificate.signature import check_signature

        check_signature(_certificate_path(certificate), key)
    checked, run, place = verify_beside(_certificate_path(certificate), losses=losses, artifact=artifact)
    found = None
    if rescore:
        from tokenbound.config.run import RunConfig, load_config
        from tokenbound.engine.evaluate.rescore import rescore as score_again

        config = load_config(RunConfig, corpus or f"{run}/config.yaml")
        found = score_again(checked, config, losses=run, artifact=place, windows=rescore, base=base, seed=seed)
    open_points = unchecked(checked, found)
    if as_json:
        kept = ("bound_bits", "method", "num_scored_tokens", "artifact_bytes", "claim_fingerprint")
        _print_json(
            {
                "verified": True,
                **{name: getattr(checked, name) for name in kept},
                "rescored_windows": 0 if found is None else found.windows,
                "recorded_windows": None if found is None else found.of_windows,
                "largest_difference_nats": None if found is None else found.largest_difference_nats,
                "detectable_share": None if found is None else found.detectable_share,
                "not_checked": open_points,
            }
        )
        return
    screen = console()
    screen.print(verified_sentence(checked, found), soft_wrap=True)
    screen.print("Not checked:", soft_wrap=True)
    for point in open_points:
        screen.print(f"- {point}", soft_wrap=True)


@app.command()
def sign(
    certificate: Annotated[str, typer.Argument(help="certificate.json, or the run directory that holds it.")],
    key: Annotated[Path, typer.Option(help="Ed25519 private key (PEM), from openssl genpkey -algorithm ed25519.")],
    as_json: AsJson = False,
) -> None:
    """Sign a certificate; `verify --key` checks the signature."""
    from tokenbound.certificate.signature import sign as sign_certificate

    written = sign_certificate(_certificate_path(certificate), key)
    if as_json:
        _print_json({"signature": written})
    else:
        console().print(f"signature    {_near(written)}", soft_wrap=True)


@app.command()
def bound(
    losses: Annotated[
        str, typer.Argument(help="Parquet file or directory with an `nll` column (nats), flat or lists.")
    ],
    vocab_size: Annotated[int, typer.Option(help="V: width of the logits.", min=2)],
    code_length_bits: Annotated[
        float | None, typer.Option(help="Bits of the model's prefix-free code; required without --online.", min=0)
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability that a line may fail.")] = 0.05,
    method: Annotated[str, typer.Option(help="azuma, freedman, kl, all of these, or a plugin's bound.")] = "all",
    tokenizer_vocab_size: Annotated[int | None, typer.Option(help="V_tok, where smaller than V.")] = None,
    trial: Annotated[int, typer.Option(help="Ordinal of this claim among all tried on these tokens.", min=1)] = 1,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="How the model was applied, to add the bits of its code: `default`, or what differs from it as JSON "
            "or a file of JSON. Without it --code-length-bits must include them.",
        ),
    ] = None,
    online: Annotated[
        str | None,
        typer.Option(
            help="The losses were recorded while training; declare here that each token was predicted before it was "
            "learned from, in one pass. No code is then paid, and the bound is on the training run's own risk.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bounds from losses that any tool recorded; every token of the corpus must be in them once."""
    from tokenbound.bounds.lines import LINES
    from tokenbound.certificate.external import bound_losses, given_protocol
    from tokenbound.certificate.identity import protocol_bits
    from tokenbound.plugins import plugins_used
    from tokenbound.report.terminal import LinesTable, notes
    from tokenbound.report.words import TAKEN_ON_TRUST, online_sentence, plugin_sentences

    code_length_bits = _code_or_online(code_length_bits, online, protocol)
    applied = None if protocol is None else given_protocol(protocol)
    lines = bound_losses(
        losses,
        vocab_size=vocab_size,
        tokenizer_vocab_size=tokenizer_vocab_size or vocab_size,
        code_length_bits=code_length_bits,
        delta=delta,
        method=method,
        trial=trial,
        protocol=applied,
        online=online is not None,
    )
    paid = None if applied is None else protocol_bits(applied)
    plugins = plugins_used((LINES, (line["method"] for line in lines)))
    if as_json:
        found = {"bounds": lines, "protocol": applied, "protocol_bits": paid}
        declared = {} if online is None else {"prior": "online", "online_declaration": online}
        _print_json({**found, **declared, **({"plugins": plugins} if plugins else {})})
        return
    trust = TAKEN_ON_TRUST if online is None else online_sentence(online)
    console().print(LinesTable(lines, delta), *notes(lines), *plugin_sentences(plugins), trust, sep="\n")
    if online is not None:
        return
    console().print(
        "No protocol was paid for beyond --code-length-bits; give --protocol if those bits are of the model alone."
        if paid is None
        else f"The protocol's {paid:,} bits are paid for besides --code-length-bits."
    )


def _code_or_online(code_length_bits: float | None, online: str | None, protocol: str | None) -> float:
    """The bits of the model's code: given, or none where a training run is bounded.

    Raises:
        InputError: neither, or what does not go together.
    """
    if online is None:
        if code_length_bits is None:
            raise InputError("--code-length-bits is missing; give the bits of the model's code, or --online")
        return code_length_bits
    if not online.strip():
        raise InputError("--online is empty; say that each token was predicted before it was learned from, in one pass")
    if code_length_bits is not None or protocol is not None:
        raise InputError("--online pays no code; leave out --code-length-bits and --protocol")
    return 0.0


@app.command()
def compress(
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id with safetensors weights.")],
    out: Annotated[str, typer.Argument(help="The artifact to write: a path or an s3:// or gs:// URI.")],
    method: Annotated[
        str | None,
        typer.Option(help=f"{built_in_methods()}, or one of a plugin (default rtn; with --rate, kfac)."),
    ] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="Option of the method, e.g. step=0.5.")] = None,
    rate: Annotated[str | None, typer.Option(help="Rate of kfac, or `auto` to minimise the bound.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help=f"Run config whose corpus calibrates {built_in_methods(lambda method: method.needs_calibration)}."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Encode only what the checkpoint, or LoRA adapter, changes of this base.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Encode a checkpoint into an artifact and print what it costs; run it again to go on after a kill."""
    from tokenbound.api import compress as encode

    report = encode(checkpoint, out, _compress_settings(method, rate, options or []), config=config, base=base)
    if as_json:
        _print_json({"digest": report.sha256, **report.to_dict()})
    else:
        console().print(
            f"{out}: {report.num_bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight, "
            f"C(h) = {report.code_length_bits:,} bits",
            soft_wrap=True,
        )


def _compress_settings(method: str | None, rate: str | None, pairs: list[str]) -> CompressionMethod:
    """Settings of a method from the options of the command line.

    Raises:
        InputError: an unknown method or option, or a value out of range.
    """
    from tokenbound.config.run import CompressChoice, validate
    from tokenbound.store.strict_yaml import StrictYamlError, parse_yaml

    def value_of(pair: str) -> object:
        try:
            return parse_yaml(pair.partition("=")[2])
        except StrictYamlError as error:
            raise InputError(f"option {pair!r}: the value is not valid YAML: {error}") from None

    usual = "rtn" if rate is None else "kfac"
    chosen: dict[str, object] = {"method": "auto" if rate == "auto" else method or usual}
    if rate not in (None, "auto"):
        chosen["rate"] = value_of(f"rate={rate}")
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"option {pair!r} must look like step=0.5")
        chosen[pair.partition("=")[0]] = value_of(pair)
    return validate(CompressChoice, {"compress": chosen}, origin="of compress").compress


@app.command()
def inspect(
    artifact: Annotated[str, typer.Argument(help="Path or URI of an artifact, or `demo`.")],
    compare: Annotated[bool, typer.Option(help="Also run gzip, zstd and xz on every tensor (slow).")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where the bits of an artifact went."""
    from tokenbound.compression.inspection import inspect_artifact
    from tokenbound.engine.artifacts import named_artifact
    from tokenbound.report.artifact_view import artifact_view

    report = inspect_artifact(named_artifact(artifact, field="artifact"), compare=compare)
    if as_json:
        _print_json({"code_length_bits": report.code_length_bits, "digest": report.sha256, **report.to_dict()})
    else:
        console().print(artifact_view(report))


@app.command()
def pretrain(
    config: ConfigFile, overrides: PretrainOverrides = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Train a model and encode it; run it again to resume."""
    from tokenbound.config.run import PretrainConfig, load_config
    from tokenbound.engine.train.run import pretrain as run_training

    trained = run_training(load_config(PretrainConfig, config, overrides or []))
    if as_json:
        _print_json(asdict(trained))
        return
    loss = (
        "no training" if trained.loss_bits is None else f"trained to {trained.loss_bits:.4f} bits/token (training loss)"
    )
    console().print(
        f"{loss}\nmodel     {trained.model}\nartifact  {trained.artifact} ({trained.artifact_bytes:,} bytes)",
        soft_wrap=True,
    )


@app.command()
def reevaluate(
    config: ConfigFile,
    overrides: RunOverrides = None,
    fail_if_worse: Annotated[
        float | None, typer.Option(metavar="BITS", help="Exit with 5 if a bound rose by more than this.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Certify what is new in the corpus or among the models, and note it in the history; made for schedules."""
    from tokenbound.config.run import load_tree
    from tokenbound.engine.reevaluate import expand_models
    from tokenbound.engine.reevaluate import reevaluate as run_reevaluation
    from tokenbound.errors import WorseError
    from tokenbound.report.history_report import PAGE, history_table, selection_lines
    from tokenbound.store.history import read_history
    from tokenbound.store.run import RunDirectory

    runs = expand_models(load_tree(config, overrides or []), origin=str(config))
    home = RunDirectory(runs[0].how.output)
    known = {entry.name for entry in read_history(home)}
    alert = None
    try:
        run_reevaluation(runs, fail_if_worse=fail_if_worse)
    except WorseError as error:
        alert = error
    entries = read_history(home)
    if as_json:
        _print_json([asdict(entry) for entry in entries if entry.name not in known])
    elif len(entries) == len(known):
        console().print("nothing new")
    else:
        _print_whole(history_table(entries[-10:]))
        console().print(*selection_lines(entries[-10:]), sep="\n", soft_wrap=True)
        console().print(f"history      {_near(home.place(PAGE))}", soft_wrap=True)
    if alert is not None:
        raise alert


@app.command()
def history(
    run: Annotated[str, typer.Argument(help="The output of `reevaluate`.")],
    svg: Annotated[Path | None, typer.Option(help="Also write the bound over time as a plot.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was certified and when: a table and a sparkline of the bounds."""
    from tokenbound.errors import IncompleteError
    from tokenbound.report.history_report import history_svg, history_table, selection_lines, sparkline
    from tokenbound.store.history import read_history
    from tokenbound.store.run import RunDirectory

    entries = read_history(RunDirectory(run))
    if not entries:
        raise IncompleteError(f"{run} has no history; `tokenbound reevaluate CONFIG` with how.output {run} begins one")
    if svg is not None:
        svg.write_text(history_svg(entries), encoding="utf-8")
    if as_json:
        _print_json([asdict(entry) for entry in entries])
    else:
        bounds = sparkline([entry.bound_bits for entry in entries])
        _print_whole(history_table(entries))
        console().print(f"bound  {bounds}", *selection_lines(entries), sep="\n", soft_wrap=True)


@app.command()
def sweep(config: ConfigFile, overrides: SweepOverrides = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Train, encode and certify many configurations and compare them; run it again to resume."""
    from tokenbound.config.run import load_config
    from tokenbound.config.sweep import SweepConfig
    from tokenbound.engine.sweep_run import sweep as run_sweep

    chosen = load_config(SweepConfig, config, overrides or [])
    rows = run_sweep(chosen)
    if as_json:
        sys.stdout.write(_rows_json(rows))
    else:
        _print_comparison(rows, f"report  {chosen.how.output}/sweep.html, tables and plot sweep.[md|csv|json|svg]")


@app.command()
def plan(
    config: ConfigFile,
    overrides: RunOverrides = None,
    probe_seconds: Annotated[float, typer.Option(help="Seconds of scoring to measure the speed; 0: none.", min=0)] = 60,
    bits_per_weight: Annotated[float | None, typer.Option(help="Assume this code length of a checkpoint.")] = None,
    gpu_memory_gib: Annotated[float, typer.Option(help="Memory of a GPU, where there is none to ask.", min=1)] = 80,
    gpu_tflops: Annotated[float, typer.Option(help="What a GPU sustains, where there is none.", min=1e-3)] = 156,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run will cost and may show, before paying for it."""
    from tokenbound.config.run import RunConfig, load_config
    from tokenbound.engine.plan.run import plan_run
    from tokenbound.report.plan_view import plan_view

    found = plan_run(
        load_config(RunConfig, config, overrides or []),
        probe_seconds=probe_seconds,
        bits_per_weight=bits_per_weight,
        gpu_bytes=int(gpu_memory_gib * 2**30),
        gpu_tflops=gpu_tflops,
    )
    if as_json:
        _print_json(found.to_dict())
    else:
        console().print(plan_view(found))


@app.command()
def generate(
    artifact: Annotated[str, typer.Argument(help="Path or URI of an artifact, or `demo`.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or directory or hub id of a fast tokenizer.")] = "bytes",
    tokens: Annotated[int, typer.Option(help="Tokens to sample.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text on one machine.")] = 0,
    base: Annotated[str | None, typer.Option(help="Of a delta: the checkpoint or artifact that it changes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample text from the model inside an artifact, shown as it is made."""
    from tokenbound.corpus.tokenizers import load_tokenizer
    from tokenbound.engine.artifacts import named_artifact
    from tokenbound.models.generate import generate_ids
    from tokenbound.models.weights import read_base

    coder = load_tokenizer(tokenizer)
    ids = [int(i) for i in coder.encode_batch([prompt])[0]] or [coder.bos_id or 0]
    show = (lambda _: None) if as_json else _show
    shown, new = "", list[int]()
    for token in generate_ids(
        named_artifact(artifact, field="artifact"),
        ids,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_id=coder.eos_id,
        base=None if base is None else read_base(base),
    ):
        if not new:
            show(prompt)
        new.append(token)
        text = coder.decode(new)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            show(text[len(shown) :])
            shown = text
    if not new:
        show(prompt)
    if as_json:
        _print_json({"prompt": prompt, "text": coder.decode(new), "tokens": new, "seed": seed})
    else:
        show("\n")


def _show(text: str) -> None:
    # A model may say anything; a file or a pipe gets it as it is.
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@app.command()
def status(run: Annotated[str, typer.Argument(help="Run directory.")], as_json: AsJson = False) -> None:
    """How far a run is, and what each replica does; exit 3 while there is no certificate."""
    from tokenbound.errors import IncompleteError
    from tokenbound.report.status import run_status, status_view
    from tokenbound.store.run import RunDirectory

    found = run_status(RunDirectory(run))
    if as_json:
        _print_json(asdict(found))
    else:
        console().print(status_view(run, found), soft_wrap=True)
    if not found.certificate:
        raise IncompleteError(f"{run} has no certificate yet; run its command again to resume")


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(help="Directory of a run, of `reevaluate` or of a sweep; or a certificate.", metavar="DIR")
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", help="Print only this: json, markdown, latex, bibtex, model-card, eval-results or svg."
        ),
    ] = None,
    tracker: Annotated[str | None, typer.Option("--log", help="Also log it to mlflow or wandb.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what was certified again and write its HTML report anew; or print it in another form.

    Of a history, `--format` and `--log` take the latest certificate.
    """
    from tokenbound.certificate.record import CertificateRecord
    from tokenbound.report.rows import EXPORTS
    from tokenbound.report.sweep_report import ROWS
    from tokenbound.store.history import read_history
    from tokenbound.store.run import CERTIFICATE, RunDirectory

    kind = "json" if as_json else kind
    if kind not in (None, "json", *EXPORTS):
        raise InputError(f"--format {kind!r} is unknown; choose one of json, {', '.join(EXPORTS)}")
    named = base_name(run).endswith(".json")
    home = RunDirectory(split(run)[0] if named else run)
    if not named and home.exists(ROWS):
        _report_sweep(home, kind, tracker)
        return
    entries = [] if named else read_history(home)
    latest = entries[-1].certificate if entries and not home.exists(CERTIFICATE) else CERTIFICATE
    path = run if named else home.place(latest)
    certificate = CertificateRecord.load(path)
    if tracker is not None:
        from tokenbound.report.tracking import log_certificate

        log_certificate(certificate, to=tracker, files={CERTIFICATE: certificate.model_dump_json(indent=2).encode()})
        logger.info("logged to %s", tracker)
    if kind == "json":
        _print_json(certificate.model_dump(mode="json"))
    elif kind is not None:
        sys.stdout.write(visible(EXPORTS[kind](certificate)).rstrip("\n") + "\n")
    else:
        _show_and_write(certificate, split(path)[0])
        if entries:
            _report_history(home, entries)


def _show_and_write(certificate: CertificateRecord, folder: str) -> None:
    from tokenbound.errors import IncompleteError
    from tokenbound.report.details import run_details
    from tokenbound.report.html import write_report
    from tokenbound.report.terminal import certificate_view
    from tokenbound.store.run import RunDirectory

    directory, screen = RunDirectory(folder), console()
    screen.print(certificate_view(certificate))
    try:
        details = run_details(directory, certificate)
    except IncompleteError as error:
        details = None
        screen.print(f"The report goes without the plots of the losses: {error}.", soft_wrap=True)
    screen.print(f"report       {_near(write_report(directory, certificate, details))}", soft_wrap=True)


def _report_history(home: RunDirectory, entries: list[HistoryEntry]) -> None:
    from tokenbound.report.history_report import history_table, selection_lines, write_history

    _print_whole(history_table(entries[-10:]))
    console().print(*selection_lines(entries[-10:]), sep="\n", soft_wrap=True)
    console().print(f"history      {_near(write_history(home, entries))}", soft_wrap=True)


def _report_sweep(home: RunDirectory, kind: str | None, tracker: str | None) -> None:
    """Print the comparison of a sweep and write its report; or print it as JSON or Markdown.

    Raises:
        InputError: what is asked for is of a single certificate.
    """
    from tokenbound.report.sweep_report import comparison_markdown, comparison_svg, read_rows, write_sweep

    rows = read_rows(home)
    forms = {"json": _rows_json, "markdown": comparison_markdown, "svg": comparison_svg}
    if tracker is not None or kind not in (None, *forms):
        asked = "--log" if tracker is not None else f"--format {kind}"
        raise InputError(f"{asked} is for one certificate; name a trial: tokenbound report {home.place(rows[0].file)}")
    if kind is not None:
        sys.stdout.write(visible(forms[kind](rows)))
        return
    _print_comparison(rows, f"report  {_near(write_sweep(home, rows))}")


def _rows_json(rows: Sequence[SweepRow]) -> str:
    return visible_json(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False)) + "\n"


def _print_comparison(rows: Sequence[SweepRow], where: str) -> None:
    from tokenbound.report.sweep_report import comparison_table, selection_lines

    _print_whole(comparison_table(rows))
    console().print(*selection_lines(rows), where, sep="\n", soft_wrap=True)


def _print_whole(table: Table) -> None:
    """A table at its own width, however narrow the terminal: a digit that is cut off cannot be read from a log."""
    screen = console()
    unlimited = screen.options.update(max_width=10_000)
    screen.width = max(screen.width, Measurement.get(screen, unlimited, table).maximum)
    screen.print(table)


def _print_json(tree: object) -> None:
    sys.stdout.write(visible_json(json.dumps(tree, indent=2, ensure_ascii=False)) + "\n")


def run_command(name: str) -> None:
    """Run one command with the arguments of the process: what `python -m workflows.NAME` does."""
    sys.argv.insert(1, name)
    main()


def main() -> None:
    """Entry point: a user's error is one line on stderr and its own exit code."""
    try:
        app(standalone_mode=True)
    except TokenboundError as error:
        sys.stderr.write(f"tokenbound: {visible(str(error), lines=False)}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        text = disk_problem(error)
        if text is None:
            raise
        sys.stderr.write(f"tokenbound: {visible(text, lines=False)}\n")
        sys.exit(InputError.exit_code)
