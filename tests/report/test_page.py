"""The page: facts of the run are in it, foreign text is escaped, and it needs nothing from outside."""

from __future__ import annotations

import base64
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ppo_fast.report import GLOSSARY, describe_environment, read_run, write_report
from ppo_fast.report.page import render_page

VOID = {"meta", "img", "br"}


class Structure(HTMLParser):
    """Collects tags and attributes, and fails on a tag closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_without_curves(folder: Path) -> str:
    """The page with an empty image for each curve: only the tests of images pay for drawing."""
    image = folder / "empty.png"
    image.touch()
    return render_page(read_run(folder), [image] * 6)


def parsed(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    return structure


def words(page: str) -> str:
    """The page's text without tags and style, white space collapsed."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(text.split())


def test_the_numbers_of_the_run_are_on_the_page(make_run: Any) -> None:
    text = words(page_without_curves(make_run()))
    assert "40 PPO steps · 640 responses · 7 min 32 s" in text
    assert "score -0.420 → 1.29 +1.71 reward" in text
    assert "KL to the reference 0.000 → 5.80 +5.80 nats per sequence" in text
    assert "Nothing in the metrics of this run looks wrong." in text
    assert "it was a wonderful, warm and funny story" in text
    assert "score 1.30 · vader 0.230 · KL 5.50 nats · 24 tokens" in text
    # 3.6 of 11.3 s; the named parts sum to 11.02 s, which leaves 0.28 s.
    assert "rollout 31.9 % 3.60 s" in text
    assert "other 2.5 % 0.280 s" in text
    assert "kl_coef: 0.05" in text


def test_the_page_is_self_contained_and_well_formed(make_run: Any) -> None:
    folder = make_run(steps=4)
    page = write_report(folder)
    assert page == folder / "report.html"
    structure = parsed(page.read_text(encoding="utf-8"))
    assert not structure.tags & {"script", "link", "iframe", "object"}
    assert len(structure.links) == 6
    for link, name in zip(
        structure.links, ("reward", "kl", "losses", "clip_fraction", "entropy", "lengths"), strict=True
    ):
        prefix, data = link.split(",", 1)
        assert prefix == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / f"{name}.png").read_bytes()
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))


def test_text_of_models_users_and_files_is_escaped(make_run: Any) -> None:
    attack = '<script>alert("x")</script><img src=x onerror=alert(1)>\x00\ud800'
    folder = make_run(
        steps=4, change=lambda line: line | ({"eval/<b>judge</b>": 0.5} if "event" in line else {})
    )
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"prompt": attack + line["prompt"], "response": attack, "judges": {attack: 0.5}}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text('note: "<script>alert(2)</script>"\n')
    (folder / "environment.json").write_text('{"device": "<script>alert(3)</script>"}')
    page = write_report(folder).read_text(encoding="utf-8")
    structure = parsed(page)
    assert "script" not in structure.tags
    assert "b" not in structure.tags
    assert len(structure.links) == 6
    escaped = (
        "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;\ufffd\ufffd"
    )
    # Prompt, response and judge of six pairs at two steps; the prompt stands once a pair.
    assert page.count(escaped) == 6 * (1 + 2 + 2)
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert "&lt;script&gt;alert(3)&lt;/script&gt;" in page
    assert "&lt;b&gt;judge&lt;/b&gt;" in page


def test_warnings_stand_on_the_page_in_words(make_run: Any) -> None:
    folder = make_run(
        steps=6, change=lambda line: line | ({} if "event" in line else {"objective/kl": -40.0})
    )
    text = words(page_without_curves(folder))
    assert "KL is strongly negative: -40.0 nats per sequence at step 1." in text
    assert "looks wrong" not in text


def test_a_run_of_one_step_without_anything_else_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "objective/scores": 0.5}\n')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parsed(page)
    text = words(page)
    assert "1 PPO step " in text
    assert "No held-out samples from two steps to compare." in text
    assert "Measured on training batches." in text


def test_environment_is_the_runs_own_where_it_was_saved(make_run: Any) -> None:
    folder = make_run(steps=1)
    assert "Of the machine that wrote this report." in words(page_without_curves(folder))
    (folder / "environment.json").write_text(json.dumps(describe_environment() | {"device": "1 x Some GPU"}))
    text = words(page_without_curves(folder))
    assert "device 1 x Some GPU" in text
    assert "Of the machine" not in text


def test_every_metric_is_explained_on_the_page(make_run: Any) -> None:
    page = page_without_curves(make_run(steps=1))
    assert [name for name in GLOSSARY if f"<code>{escape(name)}</code>" not in page] == []
