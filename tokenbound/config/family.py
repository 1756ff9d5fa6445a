"""What a user may ask of a family. Light: importing this pulls in neither torch nor NumPy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FAMILY = "tokenbound_family"
"""Key of an architecture that says the family; absent for a dense model."""


class _Family(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Layers(_Family):
    layers: tuple[str, ...] | None = None
    """Linear layers to replace, by the last part of their name (`q_proj`) or in full; null means all but the output
    head."""


class DenseFamily(_Family):
    """Every weight of its own."""

    kind: Literal["dense"] = "dense"


class KroneckerFamily(_Layers):
    """Linear layers whose matrix is a sum of Kronecker products (see `structured.kronecker`)."""

    kind: Literal["kronecker"] = "kronecker"
    terms: int = Field(default=1, ge=1)
    """Products summed in each layer."""


class MonarchFamily(_Layers):
    """Linear layers whose matrix is a Monarch matrix (see `structured.monarch`)."""

    kind: Literal["monarch"] = "monarch"
    blocks: int = Field(default=4, ge=1)
    """Blocks of each of the two block-diagonal factors."""


class LoraFamily(_Layers):
    """Trained low-rank updates of frozen random matrices (see `structured.lora`).

    Or of a declared base (see `structured.adapter`), of which nothing else is trained; `seed` and `others` then say
    nothing.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """Rank of each update."""
    alpha: float = Field(default=16.0, gt=0)
    """Updates are scaled by alpha / rank."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the frozen random weights; part of the artifact."""
    others: Literal["trained", "frozen"] = "trained"
    """Embeddings, head and other matrices that no update is made of; norms and biases are always trained."""


class SubloraFamily(_Layers):
    """Low-rank updates that lie in a random subspace (see `structured.sublora`)."""

    kind: Literal["sublora"] = "sublora"
    rank: int = Field(default=8, ge=1)
    """Rank of each update."""
    alpha: float = Field(default=16.0, gt=0)
    """Updates are scaled by alpha / rank."""
    dimension: int = Field(default=10_000, ge=1)
    """Dimension of the subspace: trained parameters of all updates together."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the frozen weights, the first factors and the projection; part of the artifact."""
    others: Literal["trained", "frozen"] = "trained"
    """Embeddings, head and other matrices that no update is made of; norms and biases are always trained."""


class MarkovFamily(_Family):
    """Back-off n-grams: no network, what it must beat (see `structured.markov`)."""

    kind: Literal["markov"] = "markov"
    order: int = Field(default=3, ge=0, le=16)
    """Tokens of context; counted over the whole corpus."""


StructuredFamily = KroneckerFamily | MonarchFamily | LoraFamily | SubloraFamily | MarkovFamily
Family = Annotated[DenseFamily | StructuredFamily, Field(discriminator="kind")]


class FamilyChoice(_Family):
    """One family."""

    family: Family
    """The family and its options."""
