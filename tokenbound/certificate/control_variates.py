"""The control variates of a sampled run: a file in its directory, a digest on its certificate, a part of its plan."""

from __future__ import annotations

from dataclasses import replace

from tokenbound.bounds.claim import SamplingPlan
from tokenbound.bounds.columns import Ints
from tokenbound.bounds.controls import ControlVariates
from tokenbound.config.run import WindowsConfig
from tokenbound.corpus.ngram_features import FeatureRule, Features
from tokenbound.corpus.prepared import Manifest
from tokenbound.errors import MismatchError
from tokenbound.store.run import RunDirectory

FEATURES = "features.npy"
"""Of a run directory."""


def feature_rule(manifest: Manifest, windows: WindowsConfig) -> FeatureRule:
    """What the features of a corpus are, cut as a config says."""
    return FeatureRule.of(manifest, length=windows.length, context=windows.context, stride=windows.stride)


def stored_features(run: RunDirectory, sha256: str) -> Features:
    """The features that a run was begun with.

    Args:
        run: the run directory.
        sha256: their digest.

    Raises:
        IncompleteError: they are not there.
        MismatchError: they are others.
    """
    found = Features.parse(run.read(FEATURES), run.place(FEATURES))
    if found.sha256 != sha256:
        raise MismatchError(
            f"{run.place(FEATURES)} has digest {found.sha256[:12]}..., not {sha256[:12]}... of the run; restore it"
        )
    return found


def with_controls(plan: SamplingPlan, features: Features, order: Ints) -> SamplingPlan:
    """A sampling plan that takes from the windows' sums what their features explain.

    Args:
        plan: of the sample.
        features: of every window of the corpus.
        order: [n] the first windows of the draw, in its order.

    Raises:
        InputError: the features are of another corpus or draw.
    """
    return replace(plan, controls=ControlVariates(features.table, features.lengths, order))
