"""The README.md of a released model: what it is, what it was made from, how good it is."""

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

## Held-out text

{metrics}

## Lineage

{lineage}

## Training configuration

{config}

## A sample

{sample}
"""


def model_card(
    model_id: str,
    parameters: int,
    metrics: Mapping[str, Any],
    lineage: Mapping[str, Any],
    config: Mapping[str, Any],
    sample: Sample,
) -> str:
    """The card as markdown; the mappings become tables in their order."""
    quoted = "\n".join(f"> {line}" for line in (sample["prompt"] + sample["continuation"]).splitlines())
    return _CARD.format(
        model_id=model_id,
        parameters=parameters,
        prompt=sample["prompt"],
        metrics=_table("metric", "value", metrics),
        lineage=_table("what", "id", lineage),
        config=_table("option", "value", config),
        sample=quoted,
    )


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.4f}" if isinstance(value, float) and 0.001 < abs(value) < 1e6 else str(value)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
