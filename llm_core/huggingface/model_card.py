"""The model card of an exported model: its architecture, lineage, configuration and metrics."""

import html
from collections.abc import Mapping
from typing import Any

from llm_core.evaluation import Sample
from llm_core.huggingface.record import ModelRecord

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [textmill, llama]
---

# {model_id}

A decoder-only language model of the Llama architecture with {parameters:,} parameters, trained from scratch by textmill.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
# The model expects the end-of-text token in front of a document.
inputs = tokenizer(tokenizer.eos_token + {prompt!r}, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))
```

{metrics}## Lineage

{lineage}

## Training configuration

{config}

{sample}"""

# Fields of the record, in the order of the table.
_LINEAGE = (
    *("run_id", "checkpoint_id", "step", "tokens_seen", "dataset_id", "tokenizer_id", "code_version", "git_commit", "seed"),
    *("parent_run_id", "snapshot_id", "dataset_tokens"),
)


def model_card(record: ModelRecord, parameters: int, config: Mapping[str, Any], sample: Sample | None) -> str:
    """The card as markdown; without metrics or a sample their sections are left out.

    config: the resolved options of the run.
    """
    prompt = sample["prompt"] if sample is not None else "Once"
    text = prompt + sample["continuation"] if sample is not None else ""
    code = "\n".join(f"    {line}" for line in text.splitlines())  # a code block: model output is not markup
    known = record.known_fields()
    return _CARD.format(
        model_id=record.model_id,
        parameters=parameters,
        prompt=prompt,
        metrics=_section("Held-out text", _table("metric", "value", record.metrics)) if record.metrics else "",
        lineage=_table("what", "id", {name: known[name] for name in _LINEAGE if name in known}),
        config=_table("option", "value", config),
        sample=_section("A sample", code) if code else "",
    )


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n\n"


def _cell(text: str) -> str:
    """Text escaped for a table cell: an option can contain anything, such as the name of a folder."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[", "\\[")


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {_cell(name)} | {_cell(shown)} |")
    return "\n".join(lines)
