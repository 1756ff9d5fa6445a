"""Causal attention of short windows on a CPU: blocks of queries, each beside the keys that it may see.

Shape legend: B windows of a batch, H heads, K heads of keys and values, L tokens of a window, d width of a head.

Up to 512 keys torch's causal kernel computes the whole square of scores, and it does not know which windows are short.
Blocks leave out most of what lies above the diagonal, and every query behind a window's last scored token. A block of a
window has one shape whatever else is scored, so what is left out moves no bit of what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BLOCK_QUERIES = 64
LONGEST = 512
"""Tokens of the longest window for which blocks pay: beyond it torch's kernel leaves out blocks of keys itself."""

Block = tuple[slice, slice]
"""Windows that stand side by side, and queries of theirs."""


def blocks(used: Sequence[int], length: int) -> Iterator[Block]:
    """Blocks of queries that cover the first so many tokens of each window.

    Args:
        used: tokens of each window, B numbers of at most L.
        length: L.

    Example:
        >>> for rows, queries in blocks([128, 3, 0, 70], 128):
        ...     print(f"windows {rows.start} to {rows.stop - 1}, queries {queries.start} to {queries.stop - 1}")
        windows 0 to 1, queries 0 to 63
        windows 3 to 3, queries 0 to 63
        windows 0 to 0, queries 64 to 127
        windows 3 to 3, queries 64 to 127
    """
    for first in range(0, length, BLOCK_QUERIES):
        queries, row = slice(first, min(first + BLOCK_QUERIES, length)), 0
        for wanted, group in groupby(tokens > first for tokens in used):
            rows = slice(row, row + len(list(group)))
            row = rows.stop
            if wanted:
                yield rows, queries


class AttentionInBlocks(TorchFunctionMode):
    """Within, torch's causal attention over the windows of a batch is computed in blocks, whatever model calls for it.

    Queries behind a window's last scored token are left out: their outputs are zero, and what the model makes of them
    means nothing. Attention of other shapes, with a mask or in training, is torch's own.

    Example::

        with AttentionInBlocks(mask):                       # bool [B, L]
            hidden = body(input_ids=ids).last_hidden_state  # [B, L, d]
    """

    def __init__(self, mask: torch.Tensor) -> None:
        """Find the blocks.

        Args:
            mask: bool [B, L] on the CPU, which predictions count.
        """
        super().__init__()
        self.batch, self.length = mask.shape
        used = torch.where(mask, torch.arange(1, self.length + 1), 0).amax(dim=1)
        self.blocks = tuple(blocks(used.tolist(), self.length))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take over what is plainly causal attention of this batch."""
        options = dict(kwargs or {})
        if func is scaled_dot_product_attention and len(args) == 3 and self._is_ours(*args, options):
            return self._attend(*args, scale=options.get("scale"))
        return func(*args, **options)

    def _is_ours(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Mapping[str, Any]) -> bool:
        return bool(
            options.get("is_causal")
            and options.get("attn_mask") is None
            and not options.get("dropout_p")
            and all(each.ndim == 4 and each.device.type == "cpu" for each in (query, key, value))
            and all(each.shape[::2] == (self.batch, self.length) for each in (query, key, value))
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        # Laid out as the projection behind it reads it: [B, L, H, d].
        output = query.new_zeros(self.batch, self.length, query.shape[1], value.shape[3]).transpose(1, 2)
        for rows, queries in self.blocks:
            seen = slice(0, queries.stop)
            output[rows, :, queries] = scaled_dot_product_attention(
                query[rows, :, queries],
                key[rows, :, seen],
                value[rows, :, seen],
                attn_mask=_causal_mask(queries.start, queries.stop, query.dtype),
                scale=scale,
            )
        return output


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _causal_mask(first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """[stop - first, stop], to be added to the scores of the queries from `first` to `stop`."""
    later = torch.ones(stop - first, stop, dtype=torch.bool).triu(first + 1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill(later, float("-inf"))
