"""Pages in a real browser: nothing sticks out, charts zoom, a served report follows its run."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.cli.report import report_server

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom",
)  # fmt: skip
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="f" src="{page}" width="{width}"
height="900" style="border:0"></iframe><p id="found"></p><script>
document.getElementById("f").onload = () => {{
  const d = document.getElementById("f").contentDocument, w = d.defaultView;
  const plot = d.querySelector(".scroll svg.plot");
  const width = (node) => node.getBoundingClientRect().width;
  const names = [...d.querySelectorAll(".plot .name")].filter(width);
  const before = plot.getBoundingClientRect().width;
  d.querySelector("[data-zoom='1.6']").click();
  const after = plot.getBoundingClientRect().width;
  d.querySelector("[data-zoom='0']").click();
  document.getElementById("found").textContent = JSON.stringify({{
    sticks_out: d.documentElement.scrollWidth - w.innerWidth,
    zoom: after / before, back: plot.getBoundingClientRect().width / before,
    names: names.length,
    cut: names.filter((n) => width(n) > width(n.parentNode.querySelector("rect"))).length,
    plots: d.querySelectorAll("svg.plot").length, rows: d.querySelectorAll("details").length,
    text: getComputedStyle(d.body).color, back_color: getComputedStyle(d.body).backgroundColor,
  }});
}};
</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


def looked_at(page: Path, width: int, folder: Path, *flags: str) -> dict[str, float]:
    """Return what a browser says of a page in a window of some width."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width))
    profile = folder / f"profile-{width}-{len(flags)}"
    done = subprocess.run(
        [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={profile}", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = done.stdout.partition('id="found">')[2].partition("</p>")[0]
    assert found, done.stderr[-2000:]
    result: dict[str, float] = json.loads(found.replace("&gt;", ">"))
    return result


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    app = Path(__file__).parents[2] / "examples/applications/filter-vote/app.yaml"
    words = ["run", str(app), "--scheduler", "max-heuristic", "--output-dir", str(folder / "run")]
    assert main(words) == 0
    assert main(["report", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_fits_and_zooms(run_dir: Path, tmp_path: Path, width: int) -> None:
    found = looked_at(run_dir / "report.html", width, tmp_path)
    assert found["sticks_out"] <= 0
    assert found["zoom"] == pytest.approx(1.6, abs=0.01)
    assert found["back"] == pytest.approx(1.0, abs=0.01)
    assert found["plots"] == 5
    assert found["rows"] > 0
    assert found["names"] > 0 or width < 1280  # none fits into bars of a narrow window
    assert found["cut"] == 0


def test_the_report_is_dark_where_that_is_wanted(run_dir: Path, tmp_path: Path) -> None:
    dark = looked_at(
        run_dir / "report.html", 800, tmp_path, "--blink-settings=preferredColorScheme=0"
    )
    light = looked_at(run_dir / "report.html", 800, tmp_path)
    assert dark["back_color"] == light["back_color"].replace("255, 255, 255", "21, 24, 29")
    assert dark["text"] != light["text"]


def test_a_served_report_follows_its_run(run_dir: Path, tmp_path: Path) -> None:
    """The server answers while a run goes on, from its journal as far as it has got."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    journal = folder / "events.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[: len(whole) // 2]))
    for name in ("metrics.json", "rows/samples.json"):
        (folder / name).unlink()
    server = report_server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert 'data-refresh="3000"' in page
        assert "This run is not finished" in page
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}etc/passwd")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
