"""The engine against `loglikelihood_rolling` of lm-evaluation-harness, on the same model and the same documents.

    pip install --no-deps lm_eval    # with its dependencies it would replace the pinned ones; sacrebleu, evaluate and
                                     # the rest of its tasks are not imported by the Hugging Face backend
    python tests/benchmarks/harness.py FOLDER --shape stories gpt2 --tokens 2e5 --repeat 3

Random weights, words drawn with Zipf frequencies, documents of lognormal length (median 600 tokens, mean near 1,000,
as text from the web), cut into windows of 512. The harness runs its Hugging Face backend in batches of 8, its model
loaded and a first batch done before time is taken: as it comes, one process with all threads, and `split by hand` into
one-thread processes, each with its share of the documents. Of the engine, Ray included, the time counts from the end of
the first wave of shards to the last; tokenising, done once for a corpus, is given apart.

Losses are compared over the documents that both cut alike: those of at most one window. Of longer ones the harness
moves the last window back until it is full, which a bound may not do: where a window starts must not depend on where
the document ends. The harness adds the losses of a document in float32, whose steps are 2e-4 nats from 2,048 on;
`apart` is its difference from us as it is, `in float64` with its own option `softmax_dtype`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import commit_rate, machine, run_tree, span_s, together, write_artifact
from engine import LENGTH, SHAPES

from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.cluster.session import ray_session
from tokenbound.engine.corpus import open_corpus
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.store.run import RunDirectory

HARNESS_BATCH, ENGINE_BATCH = 8, 16
MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 600, 1.0, 8192
COMPARED = 40
"""Documents that the harness scores once more, in float64."""


@dataclass(frozen=True)
class Case:
    """One model and its documents."""

    artifact: Path
    tokenizer: Path
    documents: Path
    """JSON lines."""
    tokens: int


def write_case(folder: Path, architecture: dict[str, Any], tokens: int) -> Case:
    """Model, tokenizer and text in files."""
    vocab_size = architecture["vocab_size"]
    tokenizer = write_tokenizer(folder / f"tokenizer-{vocab_size}", vocab_size)
    artifact = write_artifact(architecture, folder / f"harness-{vocab_size}.tokenbound")
    documents = folder / f"documents-{vocab_size}-{tokens}.jsonl"
    rng, written = np.random.default_rng(0), 0
    with documents.open("w") as stream:
        while written < tokens:
            count = int(np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA), 8, MOST_TOKENS))
            words = 1 + np.floor((vocab_size - 2) ** rng.random(count)).astype(int)
            stream.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
            written += count
    return Case(artifact, tokenizer, documents, written)


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """One token for each word: `<s>`, `<unk>`, w2, w3, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def harness(case: Case, processes: int) -> tuple[float, dict[int, float]]:
    """Seconds of the harness, and the loss of every document in nats."""
    found = together(_harness_loop, (case, None, None), processes)
    return span_s(found), {number: loss for _, _, losses in found for number, loss in losses.items()}


def harness_in_float64(case: Case, documents: list[int]) -> dict[int, float]:
    """Losses of some documents with the harness's own `softmax_dtype`: its sums are then float64 too."""
    found: dict[int, float] = together(_harness_loop, (case, "float64", documents), 1)[0][2]
    return found


def _harness_loop(
    case: Case,
    softmax_dtype: str | None,
    documents: list[int] | None,
    threads: int,
    part: int,
    parts: int,
    barrier: Any,
    queue: Any,
) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from tokenbound.models.build import build_model
    from tokenbound.models.weights import decode_weights

    torch.set_num_threads(threads)
    weights = decode_weights(case.artifact.read_bytes())
    model = build_model(weights.architecture, weights.tensors, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    options = {"backend": "causal", "tokenizer": tokenizer, "max_length": LENGTH, "batch_size": HARNESS_BATCH}
    scorer = HFLM(model, device="cpu", softmax_dtype=softmax_dtype, **options)
    texts = read_texts(case)
    mine = {number: texts[number] for number in (documents or range(len(texts)))[part::parts]}

    def score(texts: list[str]) -> list[float]:
        requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
        found: list[float] = scorer.loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    score(list(mine.values())[:1])
    barrier.wait()
    started = time.monotonic()
    losses = [-value for value in score(list(mine.values()))]
    queue.put((started, time.monotonic(), dict(zip(mine, losses, strict=True))))


def read_texts(case: Case) -> list[str]:
    """Of all documents."""
    return [json.loads(line)["text"] for line in case.documents.read_text().splitlines()]


def lengths(case: Case) -> np.ndarray:
    """int64 [documents]: tokens to predict of each."""
    return np.array([1 + text.count(" ") for text in read_texts(case)])


def positions_per_token(tokens: np.ndarray) -> tuple[float, float]:
    """Positions that the harness and the engine compute for each token that they score, padding included."""
    windows: list[int] = []
    for count in map(int, tokens):
        # The harness fills the last window of a document that is longer than one.
        windows += [LENGTH] * -(-count // LENGTH) if count > LENGTH else [count]
    batches = [windows[first : first + HARNESS_BATCH] for first in range(0, len(windows), HARNESS_BATCH)]
    theirs = sum(len(batch) * max(batch) for batch in batches)
    return theirs / tokens.sum(), LENGTH * len(windows) / tokens.sum()


def engine_tree(case: Case, folder: Path, replicas: int) -> dict[str, Any]:
    """The same as a run: every document begins with BOS, which is never predicted."""
    output = folder / f"run-{case.artifact.stem}"
    tree = run_tree(case.documents, 0, case.artifact, output, context="document", batch=ENGINE_BATCH)
    tree["what"]["corpus"] = {
        "source": "jsonl",
        "paths": [str(case.documents)],
        "tokenizer": str(case.tokenizer),
        "tokenizer_is": "given",
        "add_bos": True,
        "add_eos": False,
    }
    batch_tokens = LENGTH * ENGINE_BATCH
    tree["what"]["windows"]["shard_tokens"] = max(1, case.tokens // (8 * replicas) // batch_tokens) * batch_tokens
    tree["how"]["replicas"] = replicas
    return tree


def document_losses(output: Path) -> dict[int, float]:
    """Sums of a run's losses by document, in nats."""
    run = RunDirectory(str(output))
    sums: dict[int, float] = {}
    for number in run.committed():
        losses = run.losses(run.record(number))
        names, index = np.unique(losses.document, return_inverse=True)
        for name, value in zip(names, np.bincount(index, losses.nll.astype(np.float64)), strict=True):
            sums[int(name)] = sums.get(int(name), 0.0) + float(value)
    return sums


def apart(ours: dict[int, float], theirs: dict[int, float], documents: list[int]) -> float:
    """Largest difference of a document's loss, in nats."""
    return max(abs(ours[number] - theirs[number]) for number in documents)


def measure(folder: Path, shape: str, tokens: int, repeat: int, *, compile: bool = False) -> str:
    """One row of the table: medians over the repetitions, ratios within each."""
    replicas = os.cpu_count() or 1
    case = write_case(folder, SHAPES[shape], tokens)
    tree = engine_tree(case, folder, replicas)
    tree["how"]["compile"] = compile
    output = Path(tree["how"]["output"])
    shutil.rmtree(tree["how"]["cache"], ignore_errors=True)
    config = validate(RunConfig, tree, origin="benchmark")
    started = time.monotonic()
    open_corpus(config.what.corpus, output=config.how.output, cache=config.how.cache)
    tokenising_s = time.monotonic() - started
    theirs, split, ours = [], [], []
    for _ in range(repeat):
        seconds, losses = harness(case, 1)
        theirs.append(case.tokens / seconds)
        split.append(case.tokens / harness(case, replicas)[0])
        shutil.rmtree(output, ignore_errors=True)
        evaluate(config)
        ours.append(commit_rate(output, replicas))
    recorded, alike = document_losses(output), np.flatnonzero(lengths(case) <= LENGTH).tolist()
    assert recorded.keys() == losses.keys(), "every document is scored by both"
    exact = harness_in_float64(case, alike[:COMPARED])
    ratios, by_hand = ([left / right for left, right in zip(ours, rates, strict=True)] for rates in (theirs, split))
    computed = " / ".join(f"{each:.2f}" for each in positions_per_token(lengths(case)))
    return (
        f"| {shape}{', compiled head' * compile} | {case.tokens:,} | {statistics.median(theirs):,.0f} "
        f"| {statistics.median(ours):,.0f} "
        f"| {_ratios(ratios)} | {_ratios(by_hand)} | {computed} "
        f"| {apart(recorded, losses, alike):.1e} | {apart(recorded, exact, list(exact)):.1e} | {tokenising_s:.1f} |"
    )


def _ratios(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} ({', '.join(f'{ratio:.2f}' for ratio in found)})"


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=float, default=2e5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="Set how.compile.")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    print(
        "| shape | tokens | harness, tokens/s | engine, tokens/s | engine / harness | split by hand "
        "| positions per token | apart, nats | in float64 | tokenising, s |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    with ray_session():
        for shape in chosen.shape:
            found = measure(chosen.folder.resolve(), shape, int(chosen.tokens), chosen.repeat, compile=chosen.compile)
            print(found, flush=True)


if __name__ == "__main__":
    main()
