"""The web UI as people use it: a real `dagster dev`, a real browser, and a run that is launched with a click."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from pipeline.catalog.catalog import Catalog
from tests.pipeline.conftest import TINY
from tests.support.browser import CHROMIUM, LOCATION, opened_page
from tests.support.dagster_dev import dagster_dev

pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

STEPS = 400  # a few seconds of training: long enough to watch
# Has an effect if a page interprets it as markup.
MARKUP = "<img src=x onerror=alert(1)>[a](javascript:alert(2)) | <script>alert(3)<"


@pytest.fixture(scope="module")
def home(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A textmill home with only raw text; some names contain markup, and some files are not UTF-8."""
    root = tmp_path_factory.mktemp("home")
    shutil.copytree(corpus_dir, root / "raw_text_data")
    for name in ("latin1.txt", f"{MARKUP}.txt"):
        (root / "raw_text_data" / name).write_bytes("caf\xe9".encode("latin-1") * 100)
    (root / "raw_text_data" / MARKUP).mkdir()
    for number, path in enumerate(sorted(corpus_dir.rglob("*.txt"))[:4]):
        (root / "raw_text_data" / MARKUP / f"{number}.txt").write_text(f"{MARKUP}\n{path.read_text()}")
    return root


@pytest.fixture(scope="module")
def address(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `dagster dev` for that home, with a new Dagster instance."""
    with dagster_dev(home, tmp_path_factory.mktemp("dagster_home")) as server:
        yield server.address


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    with opened_page(address, timeout_seconds=180) as page:
        yield page


@dataclass(frozen=True)
class WatchedRun:
    """What the page of a run showed."""

    # The last progress line during training.
    progress: str
    status: str
    run_id: str
    model_id: str
    # Messages of dialogs that scripts opened on any page, from then on.
    alerts: list[str]


@pytest.fixture(scope="module")
def run(page: Any, home: Path) -> WatchedRun:
    """The job `pretrain`, launched from its launchpad with a tiny configuration and watched to its end."""
    ops = {name: {"config": dict(options)} for name, options in TINY.items()}
    ops["evaluation"]["config"] |= {"sample_prompts": ["Return the", MARKUP]}
    ops["checkpoint"]["config"] |= {"max_steps": STEPS, "eval_interval": STEPS // 4, "save_interval": STEPS}
    config = {"ops": ops, "resources": {"torchrun": {"config": {"report_seconds": 0.5}}}}
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.goto(f"{LOCATION}/jobs/pretrain/playground/setup?{urlencode({'config': json.dumps(config)})}")
    page.get_by_text("No errors").wait_for()
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url("**/runs/*")
    # The button is visible only while the run is in progress.
    terminate, progress = (
        page.get_by_role("button", name="Terminate"),
        page.get_by_text(re.compile(rf"^step \d+/{STEPS}: .*tokens_per_second")),
    )
    progress.filter(visible=True).last.wait_for()
    seen = progress.last.inner_text() if terminate.is_visible() else "the run had ended"
    status = page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).first
    status.wait_for(timeout=300_000)  # as long as a busy machine takes
    catalog = Catalog(home / "catalog.duckdb")
    (trained,), (model,) = catalog.query("SELECT run_id FROM training_runs"), catalog.query("SELECT model_id FROM models")
    return WatchedRun(seen, status.inner_text(), trained["run_id"], model["model_id"], alerts)


def test_the_graph_shows_the_lineage_in_two_groups(page: Any) -> None:
    page.goto("/asset-groups?expanded=global@global:data,global@global:model")  # as after "Expand all groups"
    for group in ("data", "model"):
        page.get_by_text(group, exact=True).first.wait_for()
    for asset in ("sample_corpus", *TINY, "released_model"):
        page.get_by_text(asset, exact=True).first.wait_for()


def test_the_launchpad_offers_every_option_with_type_default_and_explanation(page: Any) -> None:
    page.goto(f"{LOCATION}/jobs/pretrain/playground")
    page.get_by_text("No errors").wait_for()
    options = page.locator(".CodeMirror-line")
    for default in ("model: auto", "optimizer: auto", "nproc_per_node: 1"):
        options.filter(has_text=default).first.wait_for()
    options.filter(has_text="optimizer: auto").click()
    page.get_by_text("Muon for the matrices in the blocks").first.wait_for()  # the help next to the editor follows the cursor
    page.get_by_text("Literal['auto', 'adamw', 'muon']").first.wait_for()


def test_a_launched_run_reports_progress_while_it_trains_and_succeeds(run: WatchedRun) -> None:
    assert "loss" in run.progress
    assert "tokens_per_second" in run.progress
    assert run.status == "Success"


def test_the_raw_text_page_lists_quarantined_files_with_reasons(page: Any, run: WatchedRun) -> None:
    page.goto("/assets/raw_text")
    assert "latin1.txt" in _shown(page, "quarantined_files")
    assert "not_utf8" in _shown(page, "quarantined_files")


def test_the_checkpoint_page_shows_what_was_trained_and_plots_its_loss(page: Any, run: WatchedRun) -> None:
    page.goto("/assets/checkpoint")
    assert _shown(page, "run_id") == run.run_id
    assert _shown(page, "steps") == str(STEPS)
    assert 0 < float(_shown(page, "validation_bits_per_byte")) < 8
    assert _picture(page, "loss_curve") > (400, 200)
    page.get_by_role("button", name="Plots").first.click()
    page.get_by_text("grad_norm", exact=True).first.wait_for()  # observed during training


def test_the_evaluation_page_compares_the_model_and_shows_samples(page: Any, run: WatchedRun) -> None:
    page.goto("/assets/evaluation")
    assert float(_shown(page, "bits_per_byte")) < float(_shown(page, "unigram_bits_per_byte"))
    assert _picture(page, "comparison") > (400, 100)
    assert "Return the" in _shown(page, "samples")


def test_the_released_model_page_names_the_model_and_its_directory(page: Any, run: WatchedRun, home: Path) -> None:
    page.goto("/assets/released_model")
    assert _shown(page, "model_id") == run.model_id
    assert _shown(page, "promoted") == "true"
    assert _shown(page, "directory") == str(home / "models" / run.model_id)


@pytest.mark.parametrize("asset", [*TINY, "released_model", "run_comparison"])
def test_names_and_texts_are_never_interpreted_as_markup(asset: str, page: Any, run: WatchedRun) -> None:
    page.goto(f"/assets/{asset}")
    if asset in ("raw_text", "evaluation"):
        page.get_by_text(MARKUP).first.wait_for()
    for button in page.get_by_text("[Show Markdown]").all():
        button.click()
        page.get_by_role("button", name="Close").wait_for()
        assert _made_of_markup(page) == 0
        page.get_by_role("button", name="Close").click()
    assert _made_of_markup(page) == 0
    assert run.alerts == []


def _made_of_markup(page: Any) -> int:
    """Number of elements that can only come from the names and texts."""
    return int(page.locator("img[src='x'], a[href^='javascript'], script:text('alert(3)')").count())


def _metadata(page: Any, key: str) -> Any:
    """The row of an asset page's metadata table."""
    return page.get_by_role("row").filter(has=page.get_by_text(key, exact=True)).first


def _shown(page: Any, key: str) -> str:
    return str(_metadata(page, key).locator("> td").last.inner_text()).strip()


def _picture(page: Any, key: str) -> tuple[int, int]:
    """Width and height of the PNG behind a metadata entry, as decoded by the browser."""
    _metadata(page, key).get_by_text("[Show Markdown]").click()
    image = page.locator("img[src^='data:image/png;base64,']")
    image.wait_for()
    width, height = image.evaluate("async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }")
    page.get_by_role("button", name="Close").click()
    image.wait_for(state="detached")
    return width, height
