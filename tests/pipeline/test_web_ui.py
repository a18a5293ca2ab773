"""The web UI as a person sees it: a real `dagster dev` and a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from tests.pipeline.conftest import Home

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

# Without these a browser looks for its maker's servers at every start.
_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def materialized(make_home: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path, Any]:
    """A home whose lineage ran under a Dagster instance that the web UI then shows."""
    dagster_home = tmp_path_factory.mktemp("dagster_home")
    (dagster_home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        home = Home(make_home().storage.root, instance)
        result = home.materialize(checkpoint={"max_steps": 60, "eval_interval": 20})
    return home, dagster_home, result


@pytest.fixture(scope="module")
def address(materialized: tuple[Home, Path, Any]) -> Iterator[str]:
    """Where a real `dagster dev` serves that home."""
    home, dagster_home, _ = materialized
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dagster", "dev", "-m", "pipeline.definitions", "-h", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {"DAGSTER_HOME": str(dagster_home), "TEXTMILL_HOME": str(home.storage.root)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url
    finally:
        family = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([psutil.Process(server.pid), *family], timeout=20)
        for process in alive:
            process.kill()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{address}/assets")
        # The first visit may be greeted by an invitation.
        page.add_locator_handler(page.get_by_role("button", name="Skip"), lambda button: button.click())
        yield page
        browser.close()


def test_the_catalog_lists_every_asset_of_the_lineage(page: Any, address: str) -> None:
    page.goto(f"{address}/locations/pipeline.definitions/asset-groups/data")
    for asset in ("sample_corpus", "raw_text", "trained_tokenizer", "tokenized_shards"):
        page.get_by_text(asset, exact=True).first.wait_for()
    page.goto(f"{address}/locations/pipeline.definitions/asset-groups/model")
    for asset in ("checkpoint", "evaluation", "released_model"):
        page.get_by_text(asset, exact=True).first.wait_for()


def test_the_checkpoint_page_tells_what_was_trained_and_draws_its_loss(
    page: Any, address: str, materialized: tuple[Home, Path, Any]
) -> None:
    home, _, result = materialized
    page.goto(f"{address}/assets/checkpoint")
    page.get_by_text(home.metadata(result, "checkpoint")["run_id"]).first.wait_for()
    page.get_by_text("validation_bits_per_byte").first.wait_for()
    page.get_by_text("Show Markdown").first.click()
    picture = page.locator("img[src^='data:image/png']").first
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 400


def test_the_released_model_page_names_the_model(page: Any, address: str, materialized: tuple[Home, Path, Any]) -> None:
    home, _, result = materialized
    page.goto(f"{address}/assets/released_model")
    page.get_by_text(home.metadata(result, "released_model")["model_id"]).first.wait_for()


def test_the_launchpad_offers_every_option_with_its_default(page: Any, address: str) -> None:
    page.goto(f"{address}/locations/pipeline.definitions/jobs/pretrain/playground")
    for line in ("batch_size: 8", "learning_rate: 0.0003", "nproc_per_node: 1"):
        page.get_by_text(line).first.wait_for()
    page.get_by_text("No errors").first.wait_for()
