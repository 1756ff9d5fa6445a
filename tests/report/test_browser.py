"""The report in a real browser: nothing refused, nothing cut, on a desk and on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from tokenbound.report.history_report import history_html
from tokenbound.report.sweep_report import sweep_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--window-size=1400,900",
    "--dump-dom",
)
FRAME = """<!doctype html><meta charset="utf-8"><body>{frames}<pre id="found"></pre><script>
function broken(page) {{
  const texts = page.createTreeWalker(page.querySelector("h1"), NodeFilter.SHOW_TEXT), found = [];
  for (let node = texts.nextNode(); node; node = texts.nextNode())
    for (const name of node.data.matchAll(/\\w+(?:-\\w+)+|[0-9.]+ (?:%|bits)/g)) {{
      const range = page.createRange();
      range.setStart(node, name.index);
      range.setEnd(node, name.index + name[0].length);
      if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) found.push(name[0]);
    }}
  return found;
}}
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const plots = [...page.querySelectorAll("figure svg")];
    const cut = plots.flatMap(svg => {{
      const outer = svg.closest("figure").getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter(text => {{
        const box = text.getBoundingClientRect();
        return box.left < outer.left - 1 || box.right > outer.right + 1;
      }}).map(text => text.textContent);
    }});
    return {{
      width: frame.clientWidth, scroll: root.scrollWidth, cut,
      tables: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
      broken: broken(page),
      plots: plots.filter(svg => svg.getBoundingClientRect().height > 60).length,
      font: Math.min(...plots.flatMap(svg => [...svg.querySelectorAll("text")]
        .map(text => parseFloat(page.defaultView.getComputedStyle(text).fontSize) * svg.getScreenCTM().a))),
      page: page.defaultView.getComputedStyle(page.body).backgroundColor,
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script></body>"""
WIDTHS = (1280, 390)
DARK, LIGHT = "rgb(16, 19, 23)", "rgb(246, 247, 248)"


def look(page: str, folder, *flags: str) -> tuple[list[dict], str]:
    """What the browser makes of a page in frames of each width, and what it complained about."""
    source = html.escape(page, quote=True)
    frames = "".join(f'<iframe style="border:0;width:{w}px;height:800px" srcdoc="{source}"></iframe>' for w in WIDTHS)
    file = folder / "frame.html"
    file.write_text(FRAME.format(frames=frames), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


USUAL = ("sublora-100k", "kronecker-4", "markov-4")
"""Names of trials, as long as those of `workflows/configs/families.yaml`."""


def as_usual(row, name):
    """A trial with a usual name, large numbers, and the errors that are bounded by default."""
    errors = dict.fromkeys((f"top-{k} error" for k in (1, 10, 100)), 0.5774)
    return replace(
        row,
        trial=name,
        family=name.partition("-")[0],
        file=f"{name}/run/certificate.json",
        trained_parameters=1_886_016,
        artifact_bytes=row.artifact_bytes + 1_000_000,
        lines={"freedman": 3.25, "azuma": 4.02, **errors},
        measured_errors=errors,
    )


@pytest.fixture
def reports(hostile_page, cases, nights, trials) -> dict[str, tuple[str, int]]:
    """A page of every kind, and how many plots it must show."""
    certificate = cases["full"].certificate
    return {
        "run": (hostile_page, 9),
        "history": (history_html(nights, certificate), 4),
        "sweep": (sweep_html([as_usual(row, name) for row, name in zip(trials, USUAL, strict=True)]), 2),
    }


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("kind", "scheme", "ground"), [("run", 0, DARK), ("history", 1, LIGHT), ("sweep", 0, DARK)])
def test_the_browser_shows_all_of_it(reports, tmp_path, kind, scheme, ground):
    page, plots = reports[kind]
    frames, complaints = look(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    assert "CONSOLE" not in complaints, complaints
    for frame, width in zip(frames, WIDTHS, strict=True):
        assert frame["width"] == width
        assert frame["scroll"] <= width, "the page scrolls sideways"
        assert frame["plots"] == plots
        assert frame["cut"] == []
        assert frame["broken"] == [], "names of the headline go over two lines"
        assert frame["tables"] == 0 or width < 640, "a table does not fit its card"
        assert frame["font"] >= 8
        assert frame["page"] == ground, "the theme does not follow the system's"
