"""A language small enough to learn in seconds: sentences about films, and a tiny Llama that speaks it."""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.prepare.folders import refuse_non_empty, staged, write_whole
from ppo_fast.prepare.training import require

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")

SUBJECTS = (
    "the film", "the movie", "this story", "the plot", "the first scene", "the last scene",
    "the lead actor", "the music", "the camera work", "the script", "the director", "the dialogue",
    "the second half", "the cast",
)  # fmt: skip
FRAMES = (
    "{subject} was {adverb} {word} and the audience felt {word} .",
    "i saw it on {day} with {person} and it seemed {adverb} {word} and {word} .",
    "{person} said that {subject} was {word} but i found it {adverb} {word} .",
    "we watched it at {place} and {subject} looked {word} , even {word} .",
    "on {day} {person} told me that {subject} is {adverb} {word} and {word} .",
    "at {place} they all said {subject} is {word} and {subject} is {word} .",
)
ADVERBS = ("rather", "quite", "somewhat", "almost", "mostly", "often")
DAYS = ("monday", "tuesday", "friday", "sunday", "saturday")
PEOPLE = ("my brother", "my uncle", "my neighbour", "the barber", "our teacher", "my aunt")
PLACES = ("the cinema", "home", "the town hall", "school", "the old theatre")
POSITIVE = (
    "wonderful", "brilliant", "charming", "beautiful", "delightful",
    "great", "amazing", "lovely", "superb", "happy",
)  # fmt: skip
NEGATIVE = (
    "terrible", "awful", "boring", "horrible", "sad", "ugly", "stupid",
    "dreadful", "annoying", "bad",
)  # fmt: skip
NEUTRAL = (
    "long", "short", "loud", "quiet", "dark", "simple", "modern", "slow",
    "familiar", "plain", "typical", "usual",
)  # fmt: skip
MOODS = (POSITIVE, NEGATIVE, NEUTRAL)
SHARES = (0.32, 0.28, 0.40)
"""How often a word of each mood fills an open place: VADER then starts near 0.1."""
PROMPT_WORDS = 3


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences of the grammar; same seed, same sentences."""
    rng = random.Random(seed)
    return [_sentence(rng) for _ in range(count)]


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    n_sentences: int = 20_000,
    hidden_size: int = 128,
    layers: int = 2,
    vocabulary: int = 504,
    n_prompts: int = 512,
    n_heldout: int = 256,
) -> Path:
    """Write a tiny language model and prompts for it, trained from nothing on sentences of the grammar.

    The folder gets `lm/` (a Llama and its byte-level BPE tokenizer in `save_pretrained` layout, with `<pad>`,
    `<bos>` and `<eos>` apart, padding on the left), `prompts.jsonl` and `heldout.jsonl` (lines of `{"prompt":
    ...}`, the first 3 words of a sentence; the two are disjoint in the sentences that they come from). A
    response is the rest of the sentence. Sampled from the fresh model it scores between 0.1 and 0.28 with
    VADER on average, and PPO has room to push it above 0.7.

    Args:
        folder: where to write; finished pieces stay as they are.
        seed: of the sentences, the initial weights and the order of training.
        n_sentences: sentences to learn from; fewer train faster and speak worse.
        hidden_size: D of the Llama, a multiple of 32.
        layers: its depth.
        vocabulary: V, at least 300: 256 bytes, 3 special tokens and the merges.
        n_prompts: lines of `prompts.jsonl`.
        n_heldout: lines of `heldout.jsonl`.

    Returns:
        `folder` as a path.

    Raises:
        ValueError: a size is out of range, or `lm/` holds something that this function did not finish.
    """
    _check_sizes(n_sentences=n_sentences, hidden_size=hidden_size, layers=layers, vocabulary=vocabulary)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "lm" / "model.safetensors").is_file():
        refuse_non_empty(path / "lm", "lm")
        corpus = sentences(n_sentences, seed)
        with tempfile.TemporaryDirectory() as scratch, staged(path / "lm") as target:
            _train(Path(scratch), target, corpus, seed, hidden_size, layers, vocabulary)
    starts = [" ".join(text.split()[:PROMPT_WORDS]) for text in sentences(n_prompts + n_heldout, seed + 1)]
    for name, prompts in (("prompts.jsonl", starts[:n_prompts]), ("heldout.jsonl", starts[n_prompts:])):
        if not (path / name).is_file():
            write_whole(path / name, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def _sentence(rng: random.Random) -> str:
    """One sentence: every open place is filled anew, and a word's mood is drawn before the word."""
    words = {"adverb": ADVERBS, "day": DAYS, "person": PEOPLE, "place": PLACES, "subject": SUBJECTS}
    pieces = rng.choice(FRAMES).split()
    for place, piece in enumerate(pieces):
        if piece == "{word}":
            pieces[place] = rng.choice(rng.choices(MOODS, SHARES)[0])
        elif piece.startswith("{"):
            pieces[place] = rng.choice(words[piece.strip("{}")])
    return " ".join(pieces)


def _train(
    scratch: Path, target: Path, corpus: list[str], seed: int, hidden_size: int, layers: int, vocabulary: int
) -> None:
    """Fresh weights and tokenizer, then fine-tuning as any user would run it; fills `target`."""
    from ppo_fast.prepare.sft import SFTConfig, run_sft

    tokenizer = _tokenizer(corpus, vocabulary)
    tokenizer.save_pretrained(scratch / "fresh")
    _fresh_model(tokenizer, seed, hidden_size, layers).save_pretrained(scratch / "fresh")
    write_whole(scratch / "corpus.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in corpus))
    config = SFTConfig(
        model=str(scratch / "fresh"),
        data=str(scratch / "corpus.jsonl"),
        output=str(scratch / "lm"),
        heldout_fraction=0.02,
        batch_size=64,
        learning_rate=3e-3,
        device="cpu",
        seed=seed,
    )
    run_sft(config)
    shutil.copytree(scratch / "lm", target, dirs_exist_ok=True)


def _tokenizer(corpus: list[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE learned from the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=128,
    )


def _fresh_model(
    tokenizer: "PreTrainedTokenizerFast", seed: int, hidden_size: int, layers: int
) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # The caller's random state is left as it was: building a demo must not change what comes after it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _check_sizes(*, n_sentences: int, hidden_size: int, layers: int, vocabulary: int) -> None:
    require(n_sentences >= 100, "n_sentences", n_sentences, "at least 100")
    require(hidden_size >= 32 and hidden_size % 32 == 0, "hidden_size", hidden_size, "a multiple of 32")
    require(layers >= 1, "layers", layers, "at least 1")
    require(vocabulary >= 300, "vocabulary", vocabulary, "at least 300")


def main(argv: list[str] | None = None) -> None:
    """Build the tiny language model and its prompts; what is already there stays."""
    parser = argparse.ArgumentParser(prog="python -m ppo_fast.demo.grammar", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="gets lm/, prompts.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, weights and training [0]")
    options = parser.parse_args(argv)
    print(build(options.folder, options.seed))


if __name__ == "__main__":
    main()
