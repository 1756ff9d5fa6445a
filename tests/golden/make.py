"""Make the golden runs anew, in FOLDER/full and FOLDER/sampled: `python make.py FOLDER`.

The text is drawn from a small Markov chain of words; the model counts its bigrams of bytes. A change that moves a
number of the certificates says why in the changelog, and only then are they made again.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tokenbound.config.run import PretrainConfig, RunConfig, validate
from tokenbound.engine.cluster.session import ray_session
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.train.run import pretrain

WORDS = ["the", "bound", "holds", "for", "every", "token", "of", "a", "corpus", "that", "was", "seen"]


def corpus(folder: Path) -> dict[str, Any]:
    """Files of 2,000 bytes and their description."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(len(WORDS), 0.3), len(WORDS))
    for number in range(12):
        text, word = "", 0
        while len(text) < 2000:
            word = int(rng.choice(len(WORDS), p=chances[word]))
            text += WORDS[word] + " "
        (folder / f"{number:02d}.txt").write_text(text)
    rule = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
    return {"source": "text", "paths": [str(folder / "*.txt")], **rule}


def main(folder: Path) -> None:
    """Train, score and keep what `verify` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # the certificates name the files, so the names are relative
    scratch = Path("scratch")
    text = corpus(scratch / "text")
    how = {"cache": str(scratch / "prepared")}
    family = {"corpus": text, "family": {"kind": "markov", "order": 1}}
    trained = {"what": family, "how": how | {"output": str(scratch / "model")}}
    with ray_session():
        pretrain(validate(PretrainConfig, trained, origin="golden"))
        artifact = next((scratch / "model").glob("*.tokenbound"))
        for name, sample in {"full": {}, "sampled": {"windows": 240, "pilot_windows": 64}}.items():
            output = scratch / name
            windows = {"length": 64, "context": "document", "shard_tokens": 8192}
            what = {"model": {"artifact": str(artifact)}, "corpus": text, "windows": windows, "sample": sample}
            what["bound"] = {"top_k": [1, 10]}
            evaluate(validate(RunConfig, {"what": what, "how": how | {"output": str(output)}}, origin="golden"))
            shutil.rmtree(name, ignore_errors=True)
            for part in ("certificate.json", "artifact.tokenbound", "losses", "shards"):
                source, target = output / part, Path(name) / part
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
