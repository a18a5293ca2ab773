"""The quickstart keeps to its own text, prepared data and release line: nothing of the user's depends on it."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_core.layout import Home
from llm_core.system import read_json
from pipeline.artifacts.pointers import find_current
from pipeline.artifacts.release import released_lines
from pipeline.assets.raw_text import raw_text
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.automation.retraining import NewText
from pipeline.automation.run_config import RunConfigError
from pipeline.automation.run_history import last_failure
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild
from pipeline.definitions import defs
from pipeline.resources import CatalogResource, Storage
from tests.pipeline.conftest import TINY
from tests.support.artifacts import contents

PREPARATION = ["raw_text", "trained_tokenizer", "tokenized_shards"]
SAMPLE = {"sample_corpus": {"at_least_bytes": 100_000}}
# `-c` replaces the configuration of a job: nothing in it says that it is for the quickstart.
OPS = {name: {"config": options} for name, options in (TINY | SAMPLE).items()}


def execute(job: str, root: Path, assets: list[str] | None = None, storage: dict[str, Any] | None = None) -> Any:
    """Runs a job, or some of its assets, with the tiny configuration."""
    chosen = [name for name in (assets or OPS) if name in OPS and (job == "quickstart" or name not in SAMPLE)]
    config = {
        "ops": {name: OPS[name] for name in chosen},
        "resources": {"storage": {"config": {"home": str(root)} | (storage or {})}},
    }
    selection = assets and [dg.AssetKey(name) for name in assets]
    with dg.DagsterInstance.ephemeral() as instance:
        return defs.resolve_job_def(job).execute_in_process(
            config, instance=instance, asset_selection=selection, raise_on_error=False
        )


def metadata(result: Any, asset: str) -> dict[str, Any]:
    (made,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in made.metadata.items()}


@pytest.fixture(scope="module")
def root(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with text of the user, in which the quickstart has prepared its own."""
    root = tmp_path_factory.mktemp("home")
    (root / "raw_text_data").mkdir()
    for path in corpus_dir.glob("*.txt"):
        (root / "raw_text_data" / path.name).write_text(path.read_text().upper())
    assert execute("quickstart", root, ["sample_corpus", *PREPARATION]).success
    return root


def test_the_quickstart_writes_to_its_own_folder(root: Path) -> None:
    home = Home(root)
    assert not list(home.raw_text.rglob("sample_corpus"))
    assert not home.prepared.metadata.exists()
    assert list(home.of_quickstart.raw_text.rglob("sample_corpus/*/*.txt"))
    assert home.of_quickstart.prepared.metadata.is_file()


def test_own_text_gets_its_own_tokenizer_and_the_other_stays(root: Path) -> None:
    assert execute("prepare_data", root, PREPARATION).success
    own, other = (read_json(place.prepared.frozen_tokenizers) for place in (Home(root), Home(root).of_quickstart))
    assert own.keys() == other.keys(), "the same configuration"
    assert own != other
    own_text = {row["path"] for row in Catalog(Home(root).catalog).query("SELECT path FROM documents")}
    again = execute("quickstart", root, ["sample_corpus", *PREPARATION])
    assert metadata(again, "trained_tokenizer")["tokenizer_id"] in other.values(), "neither replaces the other"
    assert read_json(Home(root).prepared.frozen_tokenizers) == own
    assert own_text == {row["path"] for row in Catalog(Home(root).catalog).query("SELECT path FROM documents")}


def test_the_sensor_and_the_schedule_see_only_own_text(root: Path) -> None:
    storage = Storage(home=str(root))
    execute("prepare_data", root, ["raw_text"])
    execute("quickstart", root, ["sample_corpus", "raw_text"])
    found = NewText.find(storage)
    assert (found.files, bool(found)) == (35, False)


def test_a_rebuilt_catalog_has_the_data_of_both(root: Path) -> None:
    execute("prepare_data", root, PREPARATION)
    before = contents(Catalog(Home(root).catalog))
    assert len(before["datasets"]) == len(before["tokenizers"]) == 2
    assert rebuild(root, Home(root).catalog) == []
    assert contents(Catalog(Home(root).catalog)) == before


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ({"raw_text_dir": "memory://somewhere"}, "storage: raw_text_dir memory://somewhere: the quickstart has its own text"),
        ({"release_line": "small"}, "storage: release_line small: the quickstart has its own text and release line"),
    ],
)
def test_options_for_other_text_are_refused(storage: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RunConfigError) as refused:
        execute("quickstart", tmp_path, ["sample_corpus"], storage)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_the_line_can_be_selected_for_part_of_its_lineage(root: Path) -> None:
    result = execute("prepare_data", root, ["raw_text"], {"release_line": "quickstart"})
    assert metadata(result, "raw_text")["folder"] == str(Home(root).of_quickstart.raw_text)


def test_a_failed_quickstart_is_not_the_last_training_of_own_text(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        for name in ("pretrain", "quickstart"):
            instance.create_run_for_job(dg.GraphDefinition(name=name).to_job(), status=dg.DagsterRunStatus.CANCELED)
        assert "cancelled" in str(last_failure(instance, Storage(home=str(tmp_path))))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.create_run_for_job(dg.GraphDefinition(name="quickstart").to_job(), status=dg.DagsterRunStatus.CANCELED)
        assert last_failure(instance, Storage(home=str(tmp_path))) is None


def test_the_sample_corpus_of_an_earlier_version_is_named_in_one_line(root: Path, tmp_path: Path) -> None:
    sample = tmp_path / "raw_text_data" / "sample_corpus"
    sample.mkdir(parents=True)
    for path in Home(root).raw_text.glob("*.txt"):
        (sample / path.name).write_text(path.read_text())
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [raw_text], resources={"storage": Storage(home=str(tmp_path)), "catalog": CatalogResource()}, instance=instance
        )
        (line,) = [entry.user_message for entry in instance.all_logs(result.run_id) if "earlier version" in entry.user_message]
    assert line.startswith(f"{sample}: this counts as your own text; ") and line.endswith("delete it")


def test_the_quickstart_keeps_the_text_of_an_earlier_version_and_says_how_to_replace_it(tmp_path: Path) -> None:
    sample = Home(tmp_path).of_quickstart.raw_text / "sample_corpus"
    (sample / "reference").mkdir(parents=True)
    (sample / "reference" / "lists.txt").write_text("a docstring")

    def run() -> tuple[dict[str, Any], list[str]]:
        with dg.DagsterInstance.ephemeral() as instance:
            result = dg.materialize([sample_corpus], resources={"storage": Storage(home=str(tmp_path))}, instance=instance)
            lines = [entry.user_message for entry in instance.all_logs(result.run_id) if "earlier version" in entry.user_message]
            return metadata(result, "sample_corpus"), lines

    kept, lines = run()
    assert (kept["files"], kept["bytes"]) == (1, 11)
    assert lines == [f"{sample}: this is the sample text of an earlier version; delete it to get the fairy tales"]
    shutil.rmtree(sample)
    new, lines = run()
    assert new["bytes"] > 3_600_000, "the bound of at_least_bytes"
    assert lines == []


@pytest.mark.slow
def test_the_first_own_model_is_released_beside_that_of_the_quickstart(root: Path) -> None:
    home = Home(root)
    for job, line in (("quickstart", "quickstart"), ("pretrain", None)):
        released = metadata(execute(job, root), "released_model")
        assert released["reason"].startswith("first release")
        assert released["release_line"] == (line or "default")
        assert find_current(home.released(line)) == home.model(released["model_id"]).root
    assert sorted(released_lines(Storage(home=str(root))).values()) == [["default"], ["quickstart"]]
    own, other = (find_current(place.current_checkpoint) for place in (home, home.of_quickstart))
    assert own != other
