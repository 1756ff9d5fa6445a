"""Finished runs that the forgeries begin from; each is made once, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forgery_support import Forger
from here_support import scoring_here

from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate

DECLARED = "made before the text"


def _fine_tune(base: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text_folder: Path, ray_session: None
) -> Path:
    """A folder with the runs `full`, `sampled`, `delta`, `grown` and `bits`, a sample with decisions."""
    place = tmp_path_factory.mktemp("runs")
    text = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
    corpus = {"source": "text", "paths": [str(text_folder)], **text}
    grown = place / "growing"
    grown.mkdir()
    (grown / "a.txt").write_text((text_folder / "11.txt").read_text())
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 4096}
    bound = {"methods": ["freedman", "azuma", "kl", "document"]}
    delta = {
        "checkpoint": str(_fine_tune(tiny_checkpoint, place / "tuned")),
        "base": str(tiny_checkpoint),
        "base_is_independent": DECLARED,
        "compress": {"method": "rtn", "step": 0.5},
    }
    sample = {"windows": 120, "pilot_windows": 40}
    changes: dict[str, dict[str, Any]] = {
        "full": {"bound": bound},
        "sampled": {"sample": sample, "bound": {"methods": ["freedman", "azuma", "kl"]}},
        "bits": {"sample": sample, "bound": {"methods": ["freedman", "bits"]}},
        "delta": {"model": delta},
        "grown": {"corpus": {**corpus, "paths": [str(grown)]}},
    }
    with scoring_here():
        for name, change in changes.items():
            what = {"model": {"checkpoint": str(tiny_checkpoint)}, "corpus": corpus, "windows": windows, **change}
            how = {"output": str(place / name), "cache": str(place / "prepared")}
            config = validate(RunConfig, {"what": what, "how": how}, origin="test")
            evaluate(config)
            if name == "grown":
                (grown / "b.txt").write_text((text_folder / "10.txt").read_text())
                evaluate(config)
    return place


@pytest.fixture
def forger(finished_runs: Path, tmp_path: Path) -> Callable[[str], Forger]:
    """A forger's copy of one of the runs."""
    return lambda name: Forger(finished_runs / name, tmp_path / name)
