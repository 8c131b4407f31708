"""The model card: valid front matter, the run's numbers, and nothing of the machine it was made on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_fast.report import RunSummary, SummaryRow, read_run, summarise, write_model_card
from ppo_fast.report.card import public_name

SUMMARY = RunSummary(
    steps=30,
    episodes=480,
    seconds=425.0,
    source="held-out prompts",
    rows=(
        SummaryRow("eval/score", "score", "reward", 0.04, 0.32),
        SummaryRow("eval/kl", "KL to the reference", "nats per sequence", 0.0, 3.1),
    ),
)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_and_numbers(tmp_path: Path) -> None:
    config = {
        "rewards": [{"model": "org/judge", "weight": 2.0}],
        "objective": {"kl_coef": 0.05, "kl_target": 6.0},
    }
    path = write_model_card(tmp_path, "org/some-model", config, SUMMARY)
    card = path.read_text()
    assert path == tmp_path / "README.md"
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/some-model",
        "tags": ["ppo", "rlhf", "ppo-fast"],
    }
    assert "# some-model, tuned with PPO" in card
    assert "| score | 0.040 | 0.320 | reward |" in card
    assert "| KL to the reference | 0.000 | 3.10 | nats per sequence |" in card
    assert "- Length: 30 PPO steps, 480 sampled responses, 7 min 05 s" in card
    assert "- Reward: model `org/judge`, weight 2" in card
    assert "- KL penalty: coefficient 0.05, adapted towards 6 nats per sequence" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_paths_of_the_machine_stay_out(make_run: Any, tmp_path: Path) -> None:
    run = read_run(make_run(steps=4))
    actor = run.config["models"]["actor"]
    assert actor == "/home/somebody/models/smollm2"
    card = write_model_card(tmp_path, actor, run.config, summarise(run)).read_text()
    assert "somebody" not in card
    assert str(tmp_path) not in card
    assert front_matter(card)["base_model"] == "smollm2"
    assert "- Reward: model `reward-model`, weight 1" in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["objective"] == {"kl_coef": 0.05, "kl_target": None, "epochs": 2}
    assert settings["models"] == {"actor": "smollm2", "critic": "auto"}


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/data/alice/gpt2/", "gpt2"),
        ("~/gpt2", "gpt2"),
        ("./gpt2", "gpt2"),
        ("../alice/gpt2", "gpt2"),
        ("models/cache/gpt2", "gpt2"),
        ("C:\\Users\\alice\\gpt2", "gpt2"),
        ("file:///data/alice/gpt2", "gpt2"),
        ("/", "local folder"),
    ],
)
def test_public_model_names(name: str, public: str) -> None:
    assert public_name(name, is_model=True) == public


def test_a_relative_model_folder_is_named_by_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alice" / "gpt2").mkdir(parents=True)
    assert public_name("alice/gpt2", is_model=True) == "alice/gpt2"
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/gpt2", is_model=True) == "gpt2"


def test_settings_keep_names_of_functions_and_relative_paths() -> None:
    assert public_name("ppo_fast.demo.judges:vader") == "ppo_fast.demo.judges:vader"
    assert public_name("runs/reviews") == "runs/reviews"
    assert public_name("/home/alice/rewards.py:score") == "rewards.py:score"


def test_a_run_that_tells_little_has_a_card(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, "gpt2", {}, RunSummary(1, 0, 0.0, "training batches", ())).read_text()
    assert "- Length: 1 PPO step\n" in card


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected the folder of a saved model"):
        write_model_card(tmp_path / "nowhere", "gpt2", {}, SUMMARY)
    with pytest.raises(ValueError, match="base_model: expected a model's name or folder, got ' '"):
        write_model_card(tmp_path, " ", {}, SUMMARY)
    assert list(tmp_path.iterdir()) == []
