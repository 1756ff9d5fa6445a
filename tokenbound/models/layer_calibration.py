"""Calibration of a model that does not fit: forward and backward with the weights of one layer at a time.

What is collected is what `collect_calibration` collects, from the same arithmetic. The sums of a layer, which take more
memory than its weights, are given away as soon as all passes have gone back through it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from tokenbound.compression.calibration import (
    CALIBRATION_SEED,
    Batch,
    Calibration,
    Collector,
    MatrixSums,
    collect_calibration,
)
from tokenbound.models.blocks import BlockChain

Keep = Callable[[dict[str, MatrixSums]], None]


def calibrate_by_layers(
    chain: BlockChain,
    batches: Iterable[Batch],
    keep: Keep,
    *,
    folder: Path,
    names: Collection[str] | None = None,
    seed: int = CALIBRATION_SEED,
) -> Calibration:
    """Collect what quantizers need to know of a model, on a CPU.

    Args:
        chain: the model in float32.
        batches: as in `collect_calibration`.
        keep: takes sums of matrices; a matrix may come several times, with sums to be added.
        folder: for hidden states on the way there: those of all tokens, once for each layer.
        names: tensors to collect for; None for all.
        seed: of the labels drawn from the model.

    Returns:
        Tokens and mean squares; its matrices are those that were not given to `keep`: none.
    """

    def run(passes: Sequence[Callable[[], None]], collector: Collector) -> None:
        def served(index: int) -> None:
            if found := collector.take(f"{chain.prefix}.{index}."):
                keep(found)

        chain.on_served = served
        try:
            with chain.recomputing(folder, collector.collect_squares), torch.inference_mode(False):
                chain.stream(passes)
        finally:
            chain.on_served = None
        keep(collector.take(""))

    # A layer that is computed again would find its own keys and values in the cache.
    text = chain.model.config.get_text_config()
    kept, text.use_cache = getattr(text, "use_cache", None), False
    try:
        return collect_calibration(chain.model, batches, names=names, seed=seed, run=run)
    finally:
        text.use_cache = kept
