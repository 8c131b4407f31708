"""The model card of a tuned actor: README.md beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.report.summary import RunSummary, format_duration, format_number
from ppo_fast.report.tables import visible_text

ABSOLUTE = re.compile(r"^(file://|[/~\\]|[A-Za-z]:[/\\]|\.\.)")
"""How a path begins that tells where on whose machine something lay."""

HOW_TO_LOAD = """\
## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Your prompt", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=32)[0]))
```
"""

LIMITS = """\
## Limits

- It was tuned towards a reward, which stands in for what people want and is not the same thing. A higher
  score shows that the policy learned what the reward pays for; reading its text, or a judge outside the
  training, shows more.
- On prompts and at lengths unlike those of the training the change may be small, or odd.
- What the base model had learned, errors and biases included, is still there. Nothing was tested for safety.
"""


def write_model_card(
    folder: str | Path, base_model: str, config: Mapping[str, Any], summary: RunSummary
) -> Path:
    """Write `README.md` with Hub metadata into `folder`, where the tuned model lies, and return its path.

    `base_model` is a model's name on the Hub or a local folder; of a local folder the card names the last
    part only, and so it does for every path in `config` (the run's configuration, nested mappings and lists
    of plain values). Raises ValueError if `folder` is not a folder or `base_model` is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: expected the folder of a saved model, got {str(folder)!r}")
    if not base_model.strip():
        raise ValueError(f"base_model: expected a model's name or folder, got {base_model!r}")
    card = folder / "README.md"
    card.write_text(model_card(base_model, config, summary), encoding="utf-8")
    return card


def model_card(base_model: str, config: Mapping[str, Any], summary: RunSummary) -> str:
    """The text of the card, see `write_model_card`."""
    base = public_name(base_model, is_model=True)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": base}
    matter = _yaml(front | {"tags": ["ppo", "rlhf", "ppo-fast"]})
    return "\n".join(
        [
            f"---\n{matter}---\n\n# {base.rsplit('/', 1)[-1]}, tuned with PPO\n",
            f"`{base}` after {summary.length} (proximal policy optimisation) against a reward.",
            "A KL penalty holds it near the model it started from. Made with ppo-fast.\n",
            f"## What changed\n\nStart to end, measured on {summary.source}.\n\n{_table(summary)}\n",
            f"## How it was trained\n\n{_training(_public(config), summary)}\n",
            f"Every setting:\n\n```yaml\n{_yaml(_public(config))}```\n",
            HOW_TO_LOAD,
            LIMITS,
        ]
    )


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _training(config: Mapping[str, Any], summary: RunSummary) -> str:
    """Length, reward and KL penalty of the run as a list; what the configuration leaves open is left out."""
    length = summary.length
    length += f", {summary.episodes} sampled responses" if summary.episodes else ""
    length += f", {format_duration(summary.seconds)}" if summary.seconds else ""
    lines = [f"- Length: {length}"]
    for source in config.get("rewards") or []:
        kind = "model" if source.get("model") else "function"
        lines.append(f"- Reward: {kind} `{source.get(kind)}`, weight {source.get('weight', 1.0):g}")
    objective = config.get("objective") or {}
    if "kl_coef" in objective:
        target = objective.get("kl_target")
        towards = f", adapted towards {target:g} nats per sequence" if target else ""
        lines.append(f"- KL penalty: coefficient {objective['kl_coef']:g}{towards}")
    return "\n".join(lines)


def _table(summary: RunSummary) -> str:
    rows = [
        f"| {_cell(row.label)} | {format_number(row.start)} | {format_number(row.end)} | {_cell(row.unit)} |"
        for row in summary.rows
    ]
    return "\n".join(["| | start | end | unit |", "|---|---:|---:|---|", *rows])


def _cell(text: str) -> str:
    return visible_text(text).replace("|", "\\|").replace("\n", " ")


def public_name(name: str, *, is_model: bool = False) -> str:
    """`name` as it may be published: of a path that tells about a machine, its last part; anything else
    unchanged.

    With `is_model`, a relative path counts as a path too, unless it reads as a Hub name (`owner/model`, no
    such folder here).
    """
    local = ABSOLUTE.match(name) is not None
    if is_model:
        local = local or name.startswith(".") or name.rstrip("/").count("/") > 1 or Path(name).is_dir()
    if not local:
        return name
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~", "file:")]
    return parts[-1] if parts else "local folder"


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_public(entry) for entry in value]
    if isinstance(value, str | Path):
        return public_name(str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)
