"""The mathematics: code lengths, bounds, the choice of tunings and their exact evaluation.

NumPy and SciPy only; no I/O, no torch, no Ray. Reading order: `smoothing` (the loss and its interval), `codes` (what
is paid), `theorems` (each bound as it is proved), `lines` (one class per bound: how it is tuned, coded, evaluated and
printed; `lines/base` says how to add one). What they share is the reducer: `claim` (records), `evidence` (what shards
say), `search` and `forecast_search` (grid points), `blocks` and `exact` (sums over every loss), `sampling` (a sample
for the whole), `printing` and `certify` (printed lines), `curves` (what a report draws), and `reduction` (all of it).
"""

from tokenbound.bounds.certify import certify
from tokenbound.bounds.choice import choose_tunings
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.codes import (
    artifact_code_length_bits,
    elias_delta_bits,
    kappa_nats,
    protocol_code_length_bits,
)
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.bounds.exact import LineSums, line_sums, merge_sums
from tokenbound.bounds.lines.document import (
    DocumentSums,
    certify_document,
    choose_document,
    document_sums,
    merge_document_sums,
)
from tokenbound.bounds.lines.relative import (
    RelativeSums,
    certify_relative,
    merge_relative_sums,
    relative_sums,
)
from tokenbound.bounds.printing import random_guess
from tokenbound.bounds.relative_evidence import RelativeEvidence, merge_relative_evidence
from tokenbound.bounds.relative_search import RelativeTuning, choose_relative
from tokenbound.bounds.rounding import format_bound, round_up
from tokenbound.bounds.sampled_lines import sampling_path
from tokenbound.bounds.sampling import SamplingPath, first_prefix
from tokenbound.bounds.smoothing import loss_interval_bits, loss_intervals_bits, smoothed_loss_bits
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_bound,
    azuma_predictable_bound,
    document_bound,
    document_losses_bits,
    freedman_bound,
    kl_error_bound,
    kl_grid_bound,
    paper_error_bound,
    paper_subsample_bound,
    relative_bound,
)

__all__ = [
    "Claim",
    "DocumentSums",
    "Evidence",
    "Line",
    "LineSums",
    "RelativeEvidence",
    "RelativeSums",
    "RelativeTuning",
    "SamplingPath",
    "SamplingPlan",
    "Tuning",
    "artifact_code_length_bits",
    "azuma_anytime_bound",
    "azuma_bound",
    "azuma_predictable_bound",
    "certify",
    "certify_document",
    "certify_relative",
    "choose_document",
    "choose_relative",
    "choose_tunings",
    "document_bound",
    "document_losses_bits",
    "document_sums",
    "elias_delta_bits",
    "first_prefix",
    "format_bound",
    "freedman_bound",
    "kappa_nats",
    "kl_error_bound",
    "kl_grid_bound",
    "line_sums",
    "loss_interval_bits",
    "loss_intervals_bits",
    "merge_document_sums",
    "merge_evidence",
    "merge_relative_evidence",
    "merge_relative_sums",
    "merge_sums",
    "paper_error_bound",
    "paper_subsample_bound",
    "protocol_code_length_bits",
    "random_guess",
    "relative_bound",
    "relative_sums",
    "round_up",
    "sampling_path",
    "smoothed_loss_bits",
]
