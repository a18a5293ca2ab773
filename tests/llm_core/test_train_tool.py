"""The training tool on its command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llm_core import train as train_module
from llm_core.checkpoint import newest_valid
from llm_core.checkpoint.state import load_model
from llm_core.dataset import load_manifest
from tests.support.training import flags, run_train, train_arguments


def test_the_documented_flags_train_a_model(data_dir: Path, tmp_path: Path) -> None:
    done = run_train(data_dir, tmp_path, micro_batch_size=4, mixed_precision=True, gradient_checkpointing=True, eval_interval=5)
    assert "step 10/10 | loss" in done.stderr
    assert "lr 1.00e-03" in done.stderr
    assert "tokens/s" in done.stderr
    assert "validation loss" in done.stderr
    model, state = load_model(tmp_path / "checkpoint_step_10.pt")
    assert (model.config.num_heads, model.config.num_kv_heads) == (4, 2)
    assert state["step"] == 10
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["attention"], run["accumulation_steps"]) == ("finished", "sdpa", 2)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32
    phases = {"data", "forward", "loss head", "backward", "clip", "optimizer", "validation", "save", "log"}
    assert run["seconds_by_phase"].keys() == phases
    assert "time: " in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rule_3_every_precision_has_its_flag(precision: str, data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, precision=precision, max_steps=2, batch_size=2)
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == precision


def test_it_runs_as_a_plain_file_and_loads_neither_the_compiler_nor_pandas(data_dir: Path, tmp_path: Path) -> None:
    options = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--max_steps", "1", "--batch_size", "2"]
    command = [
        sys.executable,
        "-X",
        "importtime",
        train_module.__file__,
        "--data_dir",
        str(data_dir),
        "--save_dir",
        str(tmp_path / "run"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert newest_valid(tmp_path / "run")[0]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch.distributed.tensor", "sympy", "pandas.core"}, "each takes a second or more"


def test_help_explains_every_flag() -> None:
    done = subprocess.run([sys.executable, "-m", "llm_core.train", "--help"], capture_output=True, text=True)
    for name, field in train_module.TrainOptions.model_fields.items():
        assert f"--{name}" in done.stdout
        assert field.description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5, "num_kv_heads": 5}, "num_heads 5 must divide hidden_size 32"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 must divide num_heads 4"),
        ({"micro_batch_size": 3}, "--batch_size 8 is not a multiple of --micro_batch_size 3 x 1 ranks = 3"),
        ({"learning_rate": -1}, "--learning_rate -1: Input should be greater than 0"),
        ({"max_steps": 0}, "--max_steps 0: Input should be greater than 0"),
        ({"attention": "flash"}, "--attention flash: device is cpu, not cuda"),
        ({"stride": 64}, "--stride 64 must be smaller than --max_length 64"),
        ({"hidden_size": 10**9}, "--hidden_size 1000000000 --num_layers 2: "),
        ({"num_layers": 10**9}, "parameters and a micro-batch of 8 windows of 64 tokens need at least "),
        ({"max_length": 2**40}, "choose a smaller model, --micro_batch_size or --max_length"),
        ({"batch_size": 10**12}, "--batch_size 1000000000000: Input should be less than or equal to 16777216"),
        ({"source_weights": '{"books": 3'}, "--source_weights: not readable as JSON"),
        ({"snapshot_id": "abc"}, "--snapshot_id abc: needs --dataset_id"),
        ({"no_such_flag": 1}, "--no_such_flag: no such option; --help lists them all"),
        ({"max_stpes": 1}, "--max_stpes: no such option; did you mean --max_steps?"),
        ({"profile": "10:13", "max_steps": 5}, "profile 10:13 must end within the 5 steps of the run"),
    ],
)
def test_an_invalid_option_is_refused_with_its_value(
    options: dict[str, object], message: str, data_dir: Path, tmp_path: Path
) -> None:
    done = run_train(data_dir, tmp_path / "run", check=False, **options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"), [({"no_such_flag": 1}, "--no_such_flag: "), ({"max_steps": "many"}, "--max_steps many: ")]
)
def test_several_ranks_prefix_their_messages_with_the_rank(
    options: dict[str, object], message: str, data_dir: Path, tmp_path: Path
) -> None:
    done = run_train(data_dir, tmp_path / "run", ranks=2, check=False, **options)
    assert done.returncode != 0
    # torchrun kills the others when the first one exits, perhaps before they have printed theirs.
    printed = [done.stderr.count(f"[rank {rank}] python -m llm_core.train: error: {message}") for rank in range(2)]
    assert sum(printed) == done.stderr.count(message) and max(printed) == 1


def test_cuda_without_a_gpu_is_refused(data_dir: Path, tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "llm_core.train", "--device", "cuda", "--data_dir", str(data_dir)]
    done = subprocess.run([*command, "--save_dir", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--device cuda: this machine has no usable GPU" in done.stderr


def test_a_folder_without_prepared_data_is_refused(tmp_path: Path) -> None:
    done = run_train(tmp_path / "nothing", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert f"--data_dir {tmp_path / 'nothing'}" in done.stderr
    assert "llm_core.data_prep_tool" in done.stderr


def test_an_environment_variable_never_changes_a_run(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_STEPS", "3")
    monkeypatch.setenv("SEED", "3")
    run_train(data_dir, tmp_path, max_steps=1)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1337


def test_a_save_dir_that_is_not_writable_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for save_dir in (tmp_path / "file", Path("/proc/no-such-folder")):
        done = run_train(data_dir, save_dir, check=False)
        assert done.returncode == 2
        assert f"{save_dir}: not a writable folder" in done.stderr and "Traceback" not in done.stderr


def test_a_second_run_never_overwrites_the_first(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, max_steps=1)
    done = run_train(data_dir, tmp_path, check=False, max_steps=1)
    assert done.returncode == 2
    assert "--resume auto" in done.stderr
    again = run_train(data_dir, tmp_path, max_steps=1, resume="auto")
    assert "nothing left to do" in again.stderr


def test_a_checkpoint_is_resumed_in_its_own_folder(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "run", max_steps=2, save_interval=1)
    first = tmp_path / "run/checkpoint_step_1.pt"
    arguments = train_arguments(data_dir, tmp_path, max_steps=2, save_interval=1, checkpoint=first)
    index = arguments.index("--save_dir")
    done = subprocess.run([sys.executable, *arguments[:index], *arguments[index + 2 :]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert (tmp_path / "run/set_aside/checkpoint_step_2.pt").exists() and (tmp_path / "run/checkpoint_step_2.pt").exists()


def test_a_resume_after_new_data_names_the_dataset_of_the_run(corpus_dir: Path, tmp_path: Path) -> None:
    raw, processed = Path(shutil.copytree(corpus_dir, tmp_path / "raw")), tmp_path / "processed"
    options = {"max_document_bytes": 2048, "vocab_size": 512, "max_length": 64, "num_workers": 1}
    prepare = [sys.executable, "-m", "llm_core.data_prep_tool", *flags({"input_dir": raw, "output_dir": processed} | options)]
    subprocess.run(prepare, check=True, capture_output=True)
    before = load_manifest(processed).dataset_id
    run_train(processed, tmp_path / "run", max_steps=2, save_interval=1)
    (raw / "new.txt").write_text("A text that came later. " * 50)
    subprocess.run(prepare, check=True, capture_output=True)
    refused = run_train(processed, tmp_path / "run", max_steps=2, save_interval=1, resume="auto", check=False)
    assert refused.returncode == 2
    assert f"(--dataset_id {before} is its text, without newer documents)" in refused.stderr
    assert "run_id is" not in refused.stderr, "it follows from the other differences"
    run_train(processed, tmp_path / "run", max_steps=2, save_interval=1, resume="auto", dataset_id=before)


def test_two_trainings_never_share_a_folder(data_dir: Path, tmp_path: Path) -> None:
    first = start_endless(data_dir, tmp_path)
    try:
        second = run_train(data_dir, tmp_path, check=False)
        assert second.returncode == 2
        assert f"another training (process {first.pid}) is writing here" in second.stderr
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_confirms_the_request_and_saves(number: signal.Signals, data_dir: Path, tmp_path: Path) -> None:
    process = start_endless(data_dir, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stop requested: finishing this step" in errors
    assert "stopped on request at step" in errors
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "preempted"
    record, _ = newest_valid(tmp_path)
    assert record is not None
    assert record.step == run["steps_done"] >= 1


def start_endless(data_dir: Path, save_dir: Path) -> subprocess.Popen[str]:
    """Starts a training that would take hours; returns after its first step."""
    options = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--max_steps", "10000000", "--save_interval", "0"]
    command = [sys.executable, "-m", "llm_core.train", "--data_dir", str(data_dir), "--save_dir", str(save_dir), *options]
    process = subprocess.Popen([*command, "--eval_interval", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = save_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_torchrun_leaves_nothing_behind_and_removes_what_a_killed_one_left(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, run_dir = tmp_path / "tmp", tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    killed = subprocess.Popen([*torchrun, *train_arguments(data_dir, run_dir, max_steps=10**6)], stderr=subprocess.DEVNULL)
    try:
        while not (run_dir / "metrics.jsonl").exists():
            assert killed.poll() is None
            time.sleep(0.05)
    finally:
        family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
        for process in family:
            process.kill()
        killed.wait()
    assert len(list(temporary.glob("torchelastic_*"))) == 1
    psutil.wait_procs(family)
    run_train(data_dir, tmp_path / "second", ranks=2, max_steps=3)
    assert list(temporary.glob("torchelastic_*")) == []
    assert list(tmp_path.rglob(".ranks-*")) == []
