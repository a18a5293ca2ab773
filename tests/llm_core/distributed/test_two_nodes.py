"""Training on two machines."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import assert_same_state, run_train, train_lines
from tests.support.two_nodes import ADDRESSES, RENDEZVOUS, STATIC, TwoNodes

pytestmark = pytest.mark.slow

TIMEOUT = 15  # collective_timeout in seconds of the runs that lose a machine


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    pair = TwoNodes(tmp_path)
    try:
        try:
            pair.connect()
        except FileNotFoundError:
            pytest.skip("needs the command ip of iproute2")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces, as root has: {error.stderr.strip()}")
        yield pair
    finally:
        with suppress(FileNotFoundError):
            pair.remove()


def test_two_machines_equal_two_ranks_of_one_machine_bit_for_bit(nodes: TwoNodes, data_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "eval_interval": 5, "save_interval": 5}
    for node in range(2):
        nodes.start(node, (*STATIC, f"--node_rank={node}"), data_dir, tmp_path / f"node{node}", **options)
    assert_trained_as_on_one_machine(nodes, data_dir, tmp_path, options)

    # The second machine has no checkpoint: it resumes from that of the first.
    (tmp_path / "node0/checkpoint_step_10.pt").unlink()
    for node in range(2):
        rendezvous = (*STATIC, f"--node_rank={node}")
        nodes.start(node, rendezvous, data_dir, tmp_path / f"node{node}", resume="auto", **options)
    assert nodes.wait(0, 120) == nodes.wait(1, 120) == 0
    assert "at step 5" in nodes.logs[0].read_text()
    assert_same_state(tmp_path / "one/checkpoint_step_10.pt", tmp_path / "node0/checkpoint_step_10.pt")


def test_machines_with_different_options_are_refused(nodes: TwoNodes, data_dir: Path, tmp_path: Path) -> None:
    for node in range(2):
        rendezvous = (*STATIC, f"--node_rank={node}")
        nodes.start(node, rendezvous, data_dir, tmp_path / f"node{node}", learning_rate=1e-3 * (1 + node))
    for node in range(2):
        assert nodes.wait(node, 120) != 0
        assert "learning_rate is 0.001 on rank 0 and 0.002 on rank 1" in nodes.logs[node].read_text()


def test_machines_with_the_same_documents_in_different_sources_are_refused(
    nodes: TwoNodes, corpus_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus_dir, tmp_path / "raw")
    (tmp_path / "raw" / "more").rename(tmp_path / "raw" / "moved")
    shutil.copytree(data_dir, tmp_path / "processed")
    prepare = [sys.executable, "-m", "llm_core.data_prep_tool", "--input_dir", "raw", "--output_dir", "processed"]
    prepare += ["--max_document_bytes", "2048", "--vocab_size", "512", "--max_length", "64"]
    subprocess.run(prepare, cwd=tmp_path, check=True, capture_output=True)
    for node, folder in enumerate((data_dir, tmp_path / "processed")):
        rendezvous = (*STATIC, f"--node_rank={node}")
        nodes.start(node, rendezvous, folder, tmp_path / f"node{node}", source_weights='{"*": 1}')
    for node in range(2):
        assert nodes.wait(node, 120) != 0
        assert "snapshot_id is " in nodes.logs[node].read_text()


def test_a_rendezvous_that_numbers_the_machines_trains_the_same(nodes: TwoNodes, data_dir: Path, tmp_path: Path) -> None:
    options = {"micro_batch_size": 2, "eval_interval": 5}
    for node, address in enumerate(ADDRESSES):
        # Explicit addresses, so that the machine's name need not resolve.
        host = ["--rdzv-conf=is_host=true"] if node == 0 else []
        rendezvous = (*RENDEZVOUS, f"--local-addr={address}", *host)
        nodes.start(node, rendezvous, data_dir, tmp_path / f"node{node}", **options)
    assert_trained_as_on_one_machine(nodes, data_dir, tmp_path, options)


def assert_trained_as_on_one_machine(nodes: TwoNodes, data_dir: Path, folder: Path, options: dict[str, Any]) -> None:
    for node in range(2):
        assert nodes.wait(node, 120) == 0, nodes.logs[node].read_text()
    run_train(data_dir, folder / "one", 2, **options)
    assert_same_state(folder / "one/checkpoint_step_10.pt", folder / "node0/checkpoint_step_10.pt")
    assert train_lines(folder / "one") == train_lines(folder / "node0")
    assert not (folder / "node1").exists(), "only rank 0 writes"


@pytest.mark.parametrize("disturb", ["kill", "cut"])
def test_losing_a_machine_ends_the_run_on_the_others(disturb: str, nodes: TwoNodes, data_dir: Path, tmp_path: Path) -> None:
    for node in range(2):
        rendezvous = (*STATIC, f"--node_rank={node}")
        nodes.start(node, rendezvous, data_dir, tmp_path / f"node{node}", max_steps=10**7, collective_timeout=TIMEOUT)
    nodes.wait_for_steps(tmp_path / "node0")
    if disturb == "kill":
        nodes.kill(1)
        survivors = [0]
    else:
        nodes.cut_cable()
        survivors = [0, 1]
    for node in survivors:
        assert nodes.wait(node, TIMEOUT + 45) > 0
    run = json.loads((tmp_path / "node0/run.json").read_text())
    assert run["status"] == "failed"
    assert ("by peer" if disturb == "kill" else f"Timed out waiting {TIMEOUT}000ms") in run["error"]
