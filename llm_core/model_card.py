"""The README.md of a released model: what it is, what it was made from, how good it is."""

import html
from collections.abc import Mapping
from typing import Any

from llm_core.evaluation_file import Sample

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


def model_card(
    model_id: str,
    parameters: int,
    metrics: Mapping[str, Any],
    lineage: Mapping[str, Any],
    config: Mapping[str, Any],
    sample: Sample | None,
) -> str:
    """The card as markdown; the mappings become tables in their order, without metrics or sample their parts are left out."""
    prompt = sample["prompt"] if sample is not None else "Once"
    written = prompt + sample["continuation"] if sample is not None else ""
    code = "\n".join(f"    {line}" for line in written.splitlines())  # the model's words are no markup
    return _CARD.format(
        model_id=model_id,
        parameters=parameters,
        prompt=prompt,
        metrics=_part("Held-out text", _table("metric", "value", metrics)) if metrics else "",
        lineage=_table("what", "id", lineage),
        config=_table("option", "value", config),
        sample=_part("A sample", code) if code else "",
    )


def _part(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n\n"


def _cell(text: str) -> str:
    """Text as a cell shows it: an option may hold the name of a folder, which may hold anything."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[", "\\[")


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {_cell(name)} | {_cell(shown)} |")
    return "\n".join(lines)
