"""The deployment files have the tested settings and open nothing to the network."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from llm_core.cli import parse_options
from llm_core.system import read_json
from llm_core.train import PROG, TrainOptions
from pipeline.assets.checkpoint import checkpoint
from pipeline.automation.jobs import LINEAGE
from pipeline.processes.tools import option_list
from tests.pipeline.conftest import TINY, Home
from tests.support.dagster_dev import ROOT

DEPLOY = ROOT / "deploy"
INSTANCE = yaml.safe_load((ROOT / "dagster.yaml").read_text())


def kubernetes() -> list[dict[str, Any]]:
    return [part for path in (DEPLOY / "kubernetes").glob("*.yaml") for part in yaml.safe_load_all(path.read_text())]


def test_the_containers_have_the_tested_settings_and_their_own_storage() -> None:
    containers = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    assert {name: value for name, value in containers.items() if name not in ("storage", "compute_logs")} == INSTANCE


def test_kubernetes_has_the_tested_limits_and_retries() -> None:
    (cluster,) = [part["data"]["dagster.yaml"] for part in kubernetes() if "dagster.yaml" in part.get("data", {})]
    for section in ("telemetry", "concurrency", "run_retries"):
        assert yaml.safe_load(cluster)[section] == INSTANCE[section]


def test_the_web_ui_is_reachable_only_from_this_machine() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "webserver": ["127.0.0.1:3000:3000"]
    }
    (webserver,) = [part for part in kubernetes() if part["kind"] == "Deployment" and part["metadata"]["name"] == "webserver"]
    arguments = webserver["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("-h") + 1] == "127.0.0.1"
    for document in (ROOT / "README.md", DEPLOY / "README.md"):
        for command in re.findall(r"dagster(?:-webserver| dev)[^\n`]* -h (\S+)", document.read_text()):
            assert command == "127.0.0.1", document


def test_no_file_contains_a_password() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for value in re.findall(r"PASSWORD(?:: |=)([^\s'\"]+)", path.read_text()):
                assert value.startswith(("${POSTGRES_PASSWORD:?", "...", "%s")), path


def test_the_image_can_compile_and_records_its_commit(tmp_path: Path) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    (installed,) = re.findall(r"^RUN apt-get .*$", dockerfile, re.MULTILINE)
    assert {"gcc", "g++", "git"} <= set(installed.split())
    (records_commit,) = re.findall(r"^ARG GIT_COMMIT=\nRUN (.*)$", dockerfile, re.MULTILINE)
    for commit in ("", "0123456789abcdef0123456789abcdef01234567"):
        place = tmp_path / f"image{commit}"
        (place / "llm_core").mkdir(parents=True)
        environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_SYSTEM": str(place / "gitconfig"), "GIT_COMMIT": commit}
        subprocess.run(["sh", "-ec", records_commit], cwd=place, env=environment, check=True)
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=place / "llm_core", env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == commit


def test_a_restarted_multi_node_training_keeps_its_dataset() -> None:
    (job,) = [part for part in kubernetes() if part["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    _, command = container["args"][0].split("-m llm_core.train ")
    names = {variable["name"]: variable["value"] for variable in container["env"]}
    options = parse_options(TrainOptions, PROG, shlex.split(Template(command).substitute(names)))
    assert options.dataset_id == names["DATASET_ID"]
    assert options.resume == "auto"


def test_assets_that_use_the_device_are_in_its_pool() -> None:
    pools = {asset.key.to_user_string(): asset.op.pool for asset in LINEAGE}
    assert {name for name, pool in pools.items() if pool == "device"} == {"checkpoint", "evaluation"}
    assert INSTANCE["concurrency"]["pools"] == {"granularity": "run", "default_limit": 1}


@pytest.mark.slow
def test_a_training_from_elsewhere_is_reused_by_its_run_id(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    folder = home.folders.checkpoints / "multi-node"
    options = option_list({"data_dir": home.folders.prepared.root, "save_dir": folder} | TINY["checkpoint"] | {"seed": 11})
    subprocess.run([sys.executable, "-m", "llm_core.train", *options], check=True, capture_output=True)
    run_id = read_json(folder / "run.json")["run_id"]
    folder.rename(folder.with_name(run_id))
    taken = home.metadata(home.materialize(checkpoint, checkpoint={"seed": 11}), "checkpoint")
    assert (taken["run_id"], taken["reused"]) == (run_id, True)
    assert Path(taken["file"]) == home.folders.checkpoints / run_id / "checkpoint_step_6.pt"
