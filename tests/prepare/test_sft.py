import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.prepare.sft import SFTConfig, collate, encode_rows, evaluate, run_sft

CONFIG = SFTConfig(model="m", data="d", output="o", max_length=6)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_the_response_and_its_eos_carry_loss(tokenizer):
    [example] = encode_rows([{"prompt": "the film", "response": "was good"}], tokenizer, CONFIG)
    assert example.ids == [6, 5, 7, 3, 1]
    assert example.labels == [-100, -100, 7, 3, 1]


def test_of_a_plain_text_everything_carries_loss(tokenizer):
    [example] = encode_rows([{"text": "a b"}], tokenizer, CONFIG)
    assert example.ids == example.labels == [8, 9, 1]
    [example] = encode_rows([{"text": "a b"}], tokenizer, dataclasses.replace(CONFIG, append_eos=False))
    assert example.ids == [8, 9]


def test_of_a_chat_the_last_message_is_learnt_and_ends_at_eos(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }} : {{ m['content'] }} <eos> c {% endfor %}"
        "{% if add_generation_prompt %}a :{% endif %}"
    )
    chat = [{"role": "b", "content": "hello"}, {"role": "assistant", "content": "good"}]
    try:
        [example] = encode_rows([{"messages": chat}], tokenizer, dataclasses.replace(CONFIG, max_length=20))
        with pytest.raises(
            ValueError, match=r"row 1: messages: got 'b', expected the last role to be assistant"
        ):
            encode_rows([{"messages": chat[::-1]}], tokenizer, CONFIG)
    finally:
        tokenizer.chat_template = None
    # "b : hello <eos> c a :" is the prompt, "good <eos>" the response; the template's last "c" is gone.
    assert example.ids == [9, 13, 12, 1, 10, 8, 13, 3, 1]
    assert example.labels == [-100] * 7 + [3, 1]


def test_a_long_row_is_cut_and_one_without_a_response_left_is_skipped(tokenizer):
    rows = [{"prompt": "a b c d", "response": "a b c d"}, {"prompt": "a b c d a b", "response": "good"}]
    [example] = encode_rows(rows, tokenizer, CONFIG)
    assert example.ids == [8, 9, 10, 11, 8, 9]
    assert example.labels == [-100] * 4 + [8, 9]


def test_a_batch_is_padded_on_the_right(tokenizer):
    rows = [{"text": "a b c"}, {"text": "d"}]
    batch = collate(encode_rows(rows, tokenizer, CONFIG), pad=0)
    assert batch["input_ids"].tolist() == [[8, 9, 10, 1], [11, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 9, 10, 1], [11, 1, -100, -100]]


def test_held_out_loss_is_a_mean_over_tokens_whatever_the_batches(tokenizer, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    examples = encode_rows([{"text": "a b c d"}, {"text": "good"}, {"text": "the film"}], tokenizer, CONFIG)
    whole, single = (evaluate(model, examples, batch_size=size) for size in (3, 1))
    assert single == pytest.approx(whole, rel=1e-5)
    logprobs = []
    with torch.no_grad():
        for example in examples:
            rows = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            logprobs += [rows[t, label].item() for t, label in enumerate(example.ids[1:])]
    # 4 + 1 + 2 tokens follow another one.
    assert len(logprobs) == 7
    assert whole["loss"] == pytest.approx(-sum(logprobs) / 7, rel=1e-5)
    assert whole["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / 7), rel=1e-5)


@pytest.fixture
def config(tmp_path, tiny_model):
    rows = [{"prompt": "the film", "response": "was good"}, {"prompt": "a b", "response": "c d"}] * 20
    return SFTConfig(
        model=str(tiny_model),
        data=write(tmp_path / "data.jsonl", rows),
        output=str(tmp_path / "out"),
        learning_rate=1e-2,
        batch_size=8,
        epochs=10,
        device="cpu",
    )


def test_two_sentences_are_learnt_saved_and_reproduced(config, tmp_path, capsys):
    metrics = run_sft(config)
    assert metrics["heldout_token_accuracy_after"] == 1.0
    assert metrics["heldout_loss_after"] < 0.1 < metrics["heldout_loss_before"]
    assert (metrics["train_rows"], metrics["heldout_rows"], metrics["skipped_rows"]) == (38, 2, 0)
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert "ppo-fast sft" in (out / "README.md").read_text()
    assert capsys.readouterr().out.count("held-out") == 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the film", return_tensors="pt").input_ids
    assert (
        tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=5)[0])
        == "the film was good <eos>"
    )
    again = run_sft(dataclasses.replace(config, output=str(tmp_path / "again")))
    assert again == metrics


def test_the_stored_type_is_kept(config, tmp_path, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16()
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "half")
    run_sft(dataclasses.replace(config, model=str(tmp_path / "half"), epochs=0.2))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": ""}, ValueError, r"model: got '', expected a path"),
        ({"model": "/nowhere"}, ValueError, r"model: no tokenizer in '/nowhere'"),
        ({"data": "/nowhere.jsonl"}, FileNotFoundError, r"/nowhere\.jsonl: no such file"),
        ({"batch_size": 0}, ValueError, r"batch_size: got 0, expected at least 1"),
        ({"learning_rate": float("nan")}, ValueError, r"learning_rate: got nan"),
        ({"warmup": 1.0}, ValueError, r"warmup: got 1\.0, expected a fraction"),
        ({"heldout_fraction": 0.0}, ValueError, r"heldout_fraction: got 0\.0"),
        ({"max_length": 2}, ValueError, r"max_length: got 2, expected room"),
        ({"device": "abacus"}, ValueError, r"device: got 'abacus'"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_sft(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_a_full_output_folder_is_refused_before_any_work(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"output: .*out is not empty"):
        run_sft(dataclasses.replace(config, model="/nowhere"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_tokenizer_that_pads_with_eos_is_refused(config, tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "eos")
    tokenizer.save_pretrained(tmp_path / "eos")
    with pytest.raises(ValueError, match=r"PAD token \(here '<eos>'\) is there and is not EOS"):
        run_sft(dataclasses.replace(config, model=str(tmp_path / "eos")))
