"""What a run will cost and may show, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tokenbound.engine.plan.run import Forecast, FormForecast, Hypothesis, Outlook, Replicas, Work

Rows = list[tuple[str, str]]


def plan_view(plan: Forecast) -> RenderableType:
    """The plan as a rich renderable: one line per question, assumptions below."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [*_work(plan.work), *_hypothesis(plan.hypothesis), *_replicas(plan.replicas), *_outlook(plan.outlook)]
    for name, value in rows:
        table.add_row(name, Text(value))
    return Group(table, *(Text(f"* {note}") for note in (*plan.notes, "nothing above is a bound")))


def _work(work: Work) -> Rows:
    return [
        ("corpus", f"{work.num_tokens:,} tokens in {work.num_windows:,} windows"),
        ("to score", f"{work.tokens_to_score:,} tokens in {work.num_shards:,} shards"),
        ("disk", f"up to {_size(work.disk_bytes)} of losses"),
    ]


def _hypothesis(model: Hypothesis) -> Rows:
    length = "not known"
    if model.code_length_bits is not None and model.artifact_bytes is not None:
        per_weight = 8 * model.artifact_bytes / max(1, model.parameters)
        length = f"{model.code_length_bits:,.0f} bits ({model.code_length_is}), {per_weight:.2f} per weight"
    return [("model", f"{model.parameters:,} weights"), ("code length", length)]


def _replicas(replicas: Replicas) -> Rows:
    parts = (replicas.weights_bytes, replicas.activations_bytes, replicas.logits_bytes)
    names = ("weights", "activations", "logits")
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in zip(names, parts, strict=True))
    rows = [
        ("a replica needs", f"{_size(replicas.total_bytes)}: {sizes}"),
        ("on GPUs", f"{replicas.gpus_each} of {_size(replicas.gpu_bytes)} for each replica"),
    ]
    rows += [(f"held {form.form}", _form(form)) for form in replicas.forms]
    rows.append(("how.weights", f"{replicas.form}: {replicas.form_because}"))
    if replicas.assumed_gpu_hours is not None:
        rate = f"if one sustains {replicas.assumed_gpu_tflops:,.0f} TFLOP/s (assumed)"
        rows.append(("GPU hours", f"{replicas.assumed_gpu_hours:,.2g}, {rate}"))
    if replicas.hours is None or replicas.tokens_per_second is None:
        return rows
    return [
        *rows,
        ("speed here", f"{replicas.tokens_per_second:,.0f} tokens/s and replica, on {replicas.device}"),
        ("time", f"{_time(replicas.hours)} on {replicas.count} replicas; {replicas.device_hours:,.2f} device hours"),
    ]


def _form(form: FormForecast) -> str:
    beside = f" and {_size(form.host_bytes)} of its host" if form.host_bytes else ""
    speed = "" if form.tokens_per_second is None else f"; {form.tokens_per_second:,.0f} tokens/s"
    disk = f"{_size(form.disk_bytes)} of disk"
    return f"{_size(form.device_bytes)}{beside}, {disk}; starts in {_time(form.load_seconds / 3600)}{speed}"


def _outlook(outlook: Outlook) -> Rows:
    rows = [("guessing", f"{outlook.random_guess_bits:.3f} bits/token")]
    if outlook.perfect_bits is not None:
        beaten = _from(outlook.perfect_tokens_to_beat_guessing)
        rows.append(("a perfect model", f"{outlook.perfect_bits:.3f} bits/token; it beats guessing {beaten}"))
    if outlook.predicted_bound_bits is not None and outlook.loss_bits is not None:
        value = f"{outlook.predicted_bound_bits:.3f} bits/token ({outlook.predicted_method})"
        rows += [
            ("loss", f"{outlook.loss_bits:.3f} bits/token on {outlook.probed_tokens:,} random tokens"),
            ("predicted", f"{value}; it beats guessing {_from(outlook.tokens_to_beat_guessing)}"),
            *((f"predicted {name}", f"{bound:.3f} bits/token") for name, bound in outlook.predicted_beside.items()),
        ]
    return rows


def _from(tokens: int | None) -> str:
    return "at no m" if tokens is None else f"from m = {tokens:,} on"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:,.1f} h"
