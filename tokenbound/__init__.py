"""Provable generalization bounds for language models, computed from every training token.

>>> import tokenbound
>>> tokenbound.bounds.elias_delta_bits(17)
9
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenbound import bounds

if TYPE_CHECKING:
    from tokenbound.api import Certificate, compress, evaluate, plan

__all__ = ["Certificate", "bounds", "compress", "evaluate", "plan"]


def __getattr__(name: str) -> Any:
    """Load what runs and certificates need only when it is asked for: importing the package stays light."""
    if name in __all__:
        from tokenbound import api

        return getattr(api, name)
    raise AttributeError(f"module 'tokenbound' has no attribute {name!r}")
