"""Takes the screenshots of the README: `python -m tests.support.pictures HOME`. HOME is created and removed.

Launches the job `quickstart` in a real `dagster dev`, follows it in a real browser, and writes the screenshots to docs/.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pipeline.automation.jobs import QUICKSTART_CONFIG
from tests.support.browser import LOCATION, opened_page
from tests.support.dagster_dev import ROOT, dagster_dev

DOCS = ROOT / "docs"
GROUPS = "global@global:data,global@global:model"


def take_pictures(page: Any, steps: int) -> None:
    ops = {name: {"config": dict(asset["config"])} for name, asset in QUICKSTART_CONFIG["ops"].items()}
    ops["checkpoint"]["config"] |= {"max_steps": steps, "eval_interval": steps // 8, "save_interval": steps // 2}
    config = json.dumps({"ops": ops, "resources": {"torchrun": {"config": {"report_seconds": 2}}}})
    page.goto(f"{LOCATION}/jobs/quickstart/playground/setup?{urlencode({'config': config})}")
    page.get_by_text("No errors").wait_for()
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url("**/runs/*")
    page.get_by_placeholder("Filter").fill(f"/{steps}: loss")
    progress = page.get_by_text(re.compile(rf"^step \d+/{steps}: .*tokens_per_second")).filter(visible=True)
    progress.nth(6).wait_for(timeout=300_000)
    page.screenshot(path=DOCS / "run.png")

    page.get_by_text(re.compile("^Success$")).first.wait_for(timeout=900_000)
    before = page.viewport_size
    page.set_viewport_size({"width": 1900, "height": 420})  # the graph is fitted to the viewport
    page.goto(f"/asset-groups?expanded={GROUPS}")
    page.get_by_text("released_model", exact=True).first.wait_for()
    page.wait_for_timeout(3000)  # the graph is animated
    page.get_by_text("Hide navigation").click()
    page.wait_for_timeout(1000)
    page.screenshot(path=DOCS / "lineage.png", clip={"x": 369, "y": 52, "width": 1531, "height": 330})
    page.set_viewport_size(before)

    for asset, entry in (("checkpoint", "loss_curve"), ("evaluation", "comparison")):
        page.goto(f"/assets/{asset}")
        page.get_by_role("row").filter(has=page.get_by_text(entry, exact=True)).first.get_by_text("[Show Markdown]").click()
        page.locator("img[src^='data:image/png;base64,']").wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=DOCS / f"{asset}.png")
        page.get_by_role("button", name="Close").click()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.pictures", description="Take the screenshots of the README.")
    parser.add_argument("home", type=Path, help="textmill home to create; its path is visible in the screenshots")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    options = parser.parse_args()
    options.home.mkdir(parents=True)
    dagster_home = Path(tempfile.mkdtemp())
    try:
        with dagster_dev(options.home, dagster_home) as server, opened_page(server.address, timeout_seconds=120) as page:
            take_pictures(page, options.steps)
    finally:
        shutil.rmtree(options.home, ignore_errors=True)
        shutil.rmtree(dagster_home, ignore_errors=True)


if __name__ == "__main__":
    main()
