"""The snippets of the README and the model card run where only transformers is installed."""

import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from llm_core.dataset import load_manifest
from llm_core.huggingface import directory
from llm_core.tokenizer import Tokenizer
from tests.llm_core.model.test_transformer import build
from tests.support.records import model_record

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow

# The versions that the README promises.
OLDEST = "4.46.3"
(NEWEST,) = re.findall(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)

# Runs the code of a document on an exported model, then reports what transformers makes of it.
CHECK = """
import json, sys
import torch, transformers
try:
    import llm_core
    sys.exit("textmill is installed here")
except ModuleNotFoundError:
    pass
directory, texts = sys.argv[1], json.loads(sys.argv[2])
for code in sys.argv[3:]:
    exec(code)
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
def generated(batch):
    inputs = tokenizer(batch, return_tensors="pt", padding=True)
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1]:].tolist()
prompts = [tokenizer.bos_token + text for text in texts]
print(json.dumps({
    "version": transformers.__version__,
    "ids": [tokenizer(text)["input_ids"] for text in prompts],
    "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in prompts],
    "one by one": [generated([text])[0] for text in prompts],
    "together": generated(prompts),
}))
"""
TEXTS = ["The class", "  naïve café's 東京 🙂\n\nx = {'a': [12345, 2.5e-3]}", "I"]


def code_of(document: str, path: Path) -> str:
    """The Python code of a document that loads a model, with the path of a real one."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", document, flags=re.S) if "AutoModelForCausalLM" in code]
    return re.sub(r'"(data/models/<model_id>|path/to/this/directory)"', repr(str(path)), code)


@pytest.fixture(scope="session")
def torch_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed PyTorch and what it needs, and nothing else: it is too large to install for each version."""
    folder, wanted = tmp_path_factory.mktemp("torch"), ["torch", "numpy"]
    for name in wanted:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or [] if not file.parts[0].startswith((".", "__"))}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))).resolve())
        needed = [re.split(r"[^\w.-]", text)[0] for text in found.requires or [] if "extra ==" not in text]
        wanted += [other for other in needed if other not in wanted and _installed(other)]
    return folder


def _installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except ModuleNotFoundError:  # for another platform
        return False


@pytest.fixture(scope="session", params=sorted({OLDEST, NEWEST}))
def python(request: pytest.FixtureRequest, torch_only: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version of transformers, and the Python of an environment with it."""
    folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
    venv.create(folder, with_pip=False)
    executable = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(executable),
        "install",
        "--quiet",
        "--no-compile",
        f"transformers=={request.param}",
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers {request.param}: {done.stderr.strip().splitlines()[-1:]}")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"{torch_only}\n")
    return request.param, executable


def test_the_snippets_run_and_tokens_and_text_are_the_same(python: tuple[str, Path], data_dir: Path, tmp_path: Path) -> None:
    version, executable = python
    tokenizer = Tokenizer.load(data_dir / load_manifest(data_dir).tokenizer.file)
    model = build(vocab_size=tokenizer.vocab_size, length=256).eval()
    card = directory.model_card(model_record(model_id="m"), 1, {}, None)
    exported = tmp_path / "a model"
    directory._write_directory(model, tokenizer, exported, card, model_record(model_id="m"))
    snippets = [code_of(document, exported) for document in ((ROOT / "README.md").read_text(), card)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [executable, "-c", CHECK, exported, json.dumps(TEXTS), *snippets],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *shown, report = done.stdout.splitlines()
    assert "\n".join(shown).startswith("<|endoftext|>The class")
    result = json.loads(report)
    assert result["version"] == version
    expected = [[tokenizer.eot_id, *tokenizer.encode(text).tolist()] for text in TEXTS]
    assert result["ids"] == expected
    assert result["decoded"] == ["<|endoftext|>" + text for text in TEXTS]
    assert result["together"] == result["one by one"], "padding changes nothing"
    with torch.no_grad():
        first = [model.logits(torch.tensor([ids]))[0, -1].argmax().item() for ids in expected]
    assert [ids[0] for ids in result["one by one"]] == first
    assert "Setting `pad_token_id`" not in done.stderr
