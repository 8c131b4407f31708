import dataclasses
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from ppo_fast.prepare.reward_model import RewardConfig, encode, run_reward
from ppo_fast.prepare.scoring import features, last_hidden, load_scorer, pairwise_loss
from ppo_fast.prepare.training import pad_right, token_mask

CPU = torch.device("cpu")
GOOD = ["the film was good", "a good film", "good", "the film : good", "a b c good", "d was good"]
BAD = [text.replace("good", "bad") for text in GOOD]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path, tiny_model):
    pairs = [{"chosen": c, "rejected": r} for c in GOOD for r in BAD]
    return RewardConfig(
        model=str(tiny_model),
        data=write(tmp_path / "pairs.jsonl", pairs),
        output=str(tmp_path / "out"),
        freeze="trunk",
        heldout_fraction=0.2,
        epochs=60,
        learning_rate=3e-2,
        device="cpu",
    )


def saved_scores(folder, texts, *, side="right"):
    """Scores as any user of transformers reads them: the classifier's own forward pass minus `score_bias`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        ).logits
    return logits.squeeze(-1) - model.config.score_bias


def test_pairwise_loss_by_hand():
    # -log sigmoid(2 - 0) = log(1 + e^-2) = 0.126928; -log sigmoid(1 - 2) = log(1 + e) = 1.313262
    loss = pairwise_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)
    assert pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_pairwise_gradient_pushes_apart_by_the_chance_of_being_wrong():
    chosen, rejected = (
        torch.tensor([0.0], requires_grad=True),
        torch.tensor([math.log(3)], requires_grad=True),
    )
    pairwise_loss(chosen, rejected).backward()
    # d/dc -log sigmoid(c - r) = -sigmoid(r - c) = -3 / (1 + 3)
    assert chosen.grad.item() == pytest.approx(-0.75, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.75, abs=1e-6)


def test_learnable_pairs_are_learnt_and_the_scores_normalised(config, tmp_path, capsys):
    metrics = run_reward(config)
    assert metrics["heldout_accuracy_after"] == 1.0
    assert metrics["heldout_loss_after"] < metrics["heldout_loss_before"]
    assert (metrics["train_rows"], metrics["heldout_rows"]) == (29, 7)
    assert capsys.readouterr().out.count("held-out") == 2
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert "score_bias" in (out / "README.md").read_text()
    good, bad = saved_scores(out, GOOD), saved_scores(out, BAD)
    assert good.min() > bad.max()


@pytest.mark.parametrize("freeze", ["trunk", 1, "none"])
def test_scores_of_the_training_texts_have_mean_0_and_deviation_1(config, tmp_path, freeze):
    everything = [{"chosen": c, "rejected": r} for c in GOOD for r in BAD]
    heldout = write(tmp_path / "heldout.jsonl", everything[:3])
    run_reward(dataclasses.replace(config, heldout=heldout, append_eos="never", freeze=freeze, epochs=2))
    scores = saved_scores(
        tmp_path / "out", [row[key] for row in everything for key in ("chosen", "rejected")]
    )
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_without_normalisation_a_pair_scorer_has_no_bias(config, tmp_path):
    metrics = run_reward(dataclasses.replace(config, normalize=False, epochs=1))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.score_bias == 0.0
    assert metrics["score_std"] > 0


@pytest.mark.parametrize("freeze", ["trunk", "none"])
def test_regression_learns_scores_in_their_own_unit(config, tmp_path, freeze):
    rows = [{"prompt": "the", "response": t, "score": 70.0} for t in GOOD]
    rows += [{"text": t, "score": "20"} for t in BAD]
    path = write(tmp_path / "scores.jsonl", rows)
    change = {
        "objective": "regression",
        "data": path,
        "heldout": path,
        "normalize": False,
        "append_eos": "never",
    }
    change |= {
        "freeze": freeze,
        **(
            {"epochs": 150, "learning_rate": 1e-1}
            if freeze == "trunk"
            else {"epochs": 50, "learning_rate": 1e-2}
        ),
    }
    metrics = run_reward(dataclasses.replace(config, **change))
    # Half 70 and half 20: variance 25^2 = 625, mean 45.
    assert metrics["heldout_mse_after"] < 625 / 20 < metrics["heldout_mse_before"]
    assert metrics["heldout_correlation_after"] > 0.95
    assert metrics["score_mean"] == pytest.approx(45, abs=2)
    scores = saved_scores(tmp_path / "out", ["the " + t for t in GOOD] + BAD)
    errors = scores - torch.tensor([70.0] * 6 + [20.0] * 6)
    assert errors.square().mean().item() == pytest.approx(metrics["heldout_mse_after"], rel=1e-2)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(config, tmp_path):
    short = dataclasses.replace(config, epochs=2)
    runs = [
        run_reward(dataclasses.replace(short, output=str(tmp_path / n), seed=s))
        for n, s in (("a", 0), ("b", 0))
    ]
    assert runs[0] == runs[1]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    run_reward(dataclasses.replace(short, output=str(tmp_path / "c"), seed=1))
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_fewer_layers_are_the_first_ones_and_a_frozen_trunk_stays(config, tmp_path, tiny_model):
    run_reward(dataclasses.replace(config, num_layers=2, epochs=1))
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    trunk = AutoModelForCausalLM.from_pretrained(tiny_model).model
    assert scorer.config.num_hidden_layers == len(scorer.model.layers) == 2
    kept = scorer.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in trunk.state_dict().items() if name in kept)


def test_only_the_named_top_layers_train(config, tmp_path, tiny_model):
    run_reward(dataclasses.replace(config, freeze=1, epochs=1))
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").model.state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_model).model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all(name.startswith("layers.2.") for name in moved)


def test_padding_on_either_side_and_of_any_length_gives_the_same_scores(config, tmp_path, tokenizer):
    run_reward(dataclasses.replace(config, epochs=1))
    texts = ["good", "the film was a b c d good"]
    right = saved_scores(tmp_path / "out", texts)
    torch.testing.assert_close(saved_scores(tmp_path / "out", texts, side="left"), right)
    torch.testing.assert_close(torch.cat([saved_scores(tmp_path / "out", [text]) for text in texts]), right)


@pytest.fixture(scope="module")
def absolute_model(tmp_path_factory):
    """Folder of a GPT-2: its learned positions tell when padding shifts them, which Llama's relative ones do not."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=14, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny_model", "absolute_model"])
def test_the_last_real_token_is_read_on_either_side(kind, request):
    model, _ = load_scorer(str(request.getfixturevalue(kind)), 1, "trunk", 0, CPU)
    model.eval()
    rows = [[8, 9, 3], [6], [5, 5, 5, 5, 4]]
    alone = torch.cat(
        [last_hidden(model, torch.tensor([row]), torch.ones(1, len(row)).long()) for row in rows]
    )
    right = last_hidden(model, pad_right(rows, 0), token_mask(rows))
    flipped = [row[::-1] for row in rows]
    left = last_hidden(model, pad_right(flipped, 0).flip(1), token_mask(flipped).flip(1))
    for found in (right, left, features(model, rows, pad=0, batch_size=2)):
        torch.testing.assert_close(found, alone)


def test_the_head_starts_small(tiny_model):
    torch.manual_seed(0)
    draws = torch.cat(
        [load_scorer(str(tiny_model), 1, "trunk", 0, CPU)[0].score.weight[0] for _ in range(40)]
    )
    # 1280 draws of N(0, 1/sqrt(33) = 0.1741): the standard error of their deviation is 2%
    assert draws.std().item() == pytest.approx(0.1741, rel=0.08)


def test_eos_ends_all_none_or_half_of_the_texts_without_regard_to_which_is_chosen(tokenizer):
    rows = [{"prompt": "the", "chosen": "good film", "rejected": "bad"}] * 200
    config = RewardConfig(max_length=9)
    # Half of 200: the standard error is 3.5%; of the pairs half end alike.
    for ends, low, high in (("always", 1, 1), ("never", 0, 0), ("half", 0.4, 0.6)):
        ids = encode(rows, tokenizer, dataclasses.replace(config, append_eos=ends)).ids
        chosen, rejected = ids[:200], ids[200:]
        assert {tuple(row[:3]) for row in chosen} == {(6, 3, 5)}
        for side in (chosen, rejected):
            assert low <= sum(row[-1] == 1 for row in side) / 200 <= high
        alike = sum((c[-1] == 1) == (r[-1] == 1) for c, r in zip(chosen, rejected, strict=True)) / 200
        assert 0.4 <= alike <= 0.6 if ends == "half" else alike == 1


def test_a_long_text_is_cut_at_its_end(tokenizer):
    rows = [{"chosen": "a b c d", "rejected": "d"}]
    texts = encode(rows, tokenizer, RewardConfig(max_length=3, append_eos="always"))
    assert texts.ids == [[8, 9, 10], [11, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, r"num_layers: got 4, expected 1 to 3"),
        ({"num_layers": 0}, r"num_layers: got 0, expected 1 to 3"),
        ({"freeze": "some"}, r"freeze: got 'some', expected none, trunk, or 1 to 3"),
        ({"freeze": 4}, r"freeze: got 4"),
        ({"objective": "guess"}, r"objective: got 'guess', expected pairwise or regression"),
        ({"append_eos": "maybe"}, r"append_eos: got 'maybe'"),
        ({"model": "/nowhere"}, r"model: no tokenizer in '/nowhere'"),
        ({"objective": "regression"}, r"line 1: has keys \{chosen, rejected\}, expected \{text, score\} or"),
        ({"output": ""}, r"output: got ''"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run_reward(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "score": "high"}] * 2, r"row 1: score: got 'high', expected a number"),
        (
            [{"text": "a", "score": 1}, {"text": "b", "score": float("nan")}],
            r"score: got nan, expected a finite",
        ),
        (
            [{"text": " ", "score": 1}, {"text": "b", "score": 2}] * 2,
            r"row \d: text: got ' ', expected text that",
        ),
        ([{"text": "a", "score": 3}] * 4, r"one and the same score"),
        ([{"text": "a", "score": 3}], r"expected at least 2 rows"),
    ],
)
def test_bad_rows_are_named(config, tmp_path, rows, message):
    bad = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        run_reward(dataclasses.replace(config, objective="regression", data=bad))
    assert not (tmp_path / "out").exists()


def test_a_full_output_folder_is_refused_before_any_work(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"output: .*out is not empty"):
        run_reward(dataclasses.replace(config, model="/nowhere"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
