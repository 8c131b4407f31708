"""Rewards that need no model: Python functions of (prompts, responses)."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def vader(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound sentiment of each response, from -1 (negative) to 1 (positive), 0 when neutral.

    A lexicon and a handful of rules (Hutto and Gilbert 2014), so it is fast and deterministic, and knows
    nothing of the reward model beside which it serves as an outside judge. Only the response counts: the
    prompt is not the policy's doing.

    Args:
        prompts: B prompts; their number is checked and their text ignored.
        responses: B responses.

    Returns:
        B floats in [-1, 1].

    Raises:
        ValueError: the two lists differ in length.
        ModuleNotFoundError: `vaderSentiment` is not installed.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"responses: got {len(responses)} for {len(prompts)} prompts, expected one for each")
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ppo_fast.demo.judges.vader needs the package vaderSentiment: pip install 'ppo-fast[demo]'"
        ) from error
    return SentimentIntensityAnalyzer()
