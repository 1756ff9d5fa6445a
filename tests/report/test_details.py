"""The arrays behind the plots agree with the certificate and with the losses they summarise."""

from __future__ import annotations

import numpy as np
import pytest

from tokenbound.bounds.evidence import Evidence
from tokenbound.report.details import MAX_PARTS, PositionLosses, report_details
from tokenbound.store.losses import Losses


@pytest.fixture(scope="module")
def details(cases):
    return cases["full"].details()


def lines_of(case):
    return {line["method"]: line for line in case.certificate.bounds if line["top_k"] is None}


def test_curves_pass_through_the_printed_values(cases, details):
    lines = lines_of(cases["full"])
    for curves in (details.size_curves, details.alpha_curves, details.stake_curves):
        assert curves
        for curve in curves:
            x, value = curve.chosen
            assert value == lines[curve.label]["value"]
            assert curve.y[curve.x.index(x)] == pytest.approx(value, abs=1e-9)


def test_chosen_alpha_is_nearly_the_best_one(details):
    for curve in details.alpha_curves:
        assert min(curve.y) == pytest.approx(curve.chosen[1], rel=2e-3)


def test_more_tokens_never_loosen_the_what_if(cases, details):
    for curve in (*details.size_curves, *cases["kl_only"].details().size_curves):
        assert list(curve.x) == sorted(curve.x)
        assert (np.diff(curve.y) <= 1e-12).all()
        assert curve.y[-1] < curve.chosen[1] < curve.y[0]


def test_what_if_repeats_the_choice_at_the_larger_size(cases):
    """An independent path: the real choice, made for a corpus of that size from the same evidence."""
    from dataclasses import replace

    from tokenbound.bounds.certify import certify
    from tokenbound.bounds.choice import choose_tunings
    from tokenbound.bounds.exact import line_sums, merge_sums

    case = cases["full"]
    found = case.details().what_if
    claim = case.certificate.claim()
    larger = replace(claim, num_tokens=round(found.num_tokens), what_if=True)
    tunings = choose_tunings(case.reduction.evidence, larger)
    sums = merge_sums([line_sums(tunings, part.nll, part.entropy, part.rank) for part in case.losses])
    freedman = next(line for line in certify(tunings, sums, larger) if line.method == "freedman")
    assert found.value == pytest.approx(freedman.value, rel=0.02)


def test_distribution_and_entropy_add_up(details):
    assert sum(details.distribution.token_share) == pytest.approx(1)
    assert sum(details.distribution.loss_share) == pytest.approx(1)
    assert len(details.distribution.edges_bits) == len(details.distribution.token_share) + 1
    assert list(details.distribution.edges_bits) == sorted(details.distribution.edges_bits)
    assert sum(details.entropy.token_share) == pytest.approx(1, abs=0.02)


def test_position_means_are_those_of_the_losses(cases, details):
    parts = cases["full"].losses
    table = np.concatenate([part.nll.reshape(-1, 64) for part in parts]) / np.log(2)
    assert details.position.place[0] == 1
    assert details.position.loss_bits[0] == pytest.approx(table[:, 0].mean(), rel=1e-6)
    assert details.position.place[-1] > 55
    assert details.position.num_tokens == table.size


def test_positions_leave_failed_windows_out_and_count_short_ones():
    nll = np.array([1.0, 2.0, np.nan, np.nan, 5.0], np.float32)
    losses = Losses(
        window_id=np.arange(3),
        offsets=np.array([0, 2, 4, 5]),
        unscored=np.array([False, True, False]),
        document=np.zeros(0, np.int64),
        position=np.zeros(0, np.int32),
        nll=nll,
        entropy=nll,
        rank=np.zeros(5, np.int32),
    )
    assert PositionLosses.of([losses, losses]) == PositionLosses((12.0, 4.0), (4, 2))


def test_artifact_rows_account_for_every_byte(cases, make_artifact_report):
    report = make_artifact_report()
    rows = cases["full"].details(report).artifact
    assert sum(row.num_bytes for row in rows) == report.num_bytes
    assert sum(row.elements for row in rows) == report.elements
    assert len(rows) <= MAX_PARTS
    assert rows[0].name.startswith("model.layers.0-")
    assert {"attention", "feed-forward", "norm"} <= set(rows[0].bytes_by_kind)


def test_without_entropies_or_tokens_the_rest_remains(cases):
    case = cases["kl_only"]
    plain = Evidence.from_losses([0.5, 2.0], vocab_size=257)
    assert report_details(plain, case.certificate).entropy is None
    empty = report_details(Evidence.from_losses([], vocab_size=257), case.certificate)
    assert empty.distribution is None
    assert empty.size_curves == ()
