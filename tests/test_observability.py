"""The Grafana dashboard asks for what the code registers, and for nothing else."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tokenbound.engine.cluster.metrics import COUNTERS, TAGS, exported_names

DASHBOARD = Path(__file__).parents[1] / "workflows" / "observability" / "grafana.json"
METRIC = re.compile(r"\bray_tokenbound_\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_is_shown_and_no_other_is_asked_for(dashboard: dict[str, Any]) -> None:
    assert set(METRIC.findall(" ".join(queries(dashboard)))) == exported_names()
    assert set(METRIC.findall(json.dumps(dashboard["templating"]))) <= exported_names()


def test_queries_fit_the_kinds_and_tags_of_the_metrics(dashboard: dict[str, Any]) -> None:
    """A counter is only ever asked for its rate: it starts again with every driver."""
    counters = {f"ray_tokenbound_{name}_total" for name in COUNTERS}
    for query in queries(dashboard):
        (name,) = METRIC.findall(query)
        assert query.count("(") == query.count(")")
        assert (name in counters) == bool(re.search(rf"\b(rate|increase)\({name}\b", query)), query
        (tag,) = TAGS.get(name.removeprefix("ray_tokenbound_").removesuffix("_total"), ("run",))
        assert f"sum by ({tag}) (" in query
        assert ('{run=~"$run"}' in query) == (tag == "run")


def test_grafana_can_read_it(dashboard: dict[str, Any]) -> None:
    """What Grafana needs of a dashboard that is imported: names, a grid without overlaps, a data source to choose."""
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = [one[a] + one[s] <= other[a] or other[a] + other[s] <= one[a] for a, s in (("x", "w"), ("y", "h"))]
        assert any(apart), (one, other)
    variables = {item["name"]: item["type"] for item in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
