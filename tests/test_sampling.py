"""The next token is drawn as the request says, and again so with the same seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.sampling import choose

VOCAB = 2000
LOGITS = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)


def draws(count: int, **sampling: float) -> list[int]:
    random = np.random.default_rng(7)
    return [choose(LOGITS, Sampling.model_validate(sampling), random).token for _ in range(count)]


def softmax(logits: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def test_without_temperature_it_is_the_likeliest() -> None:
    assert set(draws(5, temperature=0, top_p=0.1)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [1e-300, sys.float_info.min, 5e-324])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_with_hardly_any_temperature_it_is_the_likeliest(temperature: float, top_p: float) -> None:
    """Though the logits are infinite when they are divided by it."""
    assert set(draws(5, temperature=temperature, top_p=top_p)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    """By a chi-squared test on the twenty likeliest and the rest."""
    found, shares = draws(4000, temperature=temperature), softmax(LOGITS.astype(np.float64) / temperature)
    common = np.argsort(-shares)[:20]
    seen = np.array([*(found.count(int(token)) for token in common), 0])
    seen[-1] = len(found) - seen.sum()
    wanted = np.append(shares[common], 1 - shares[common].sum()) * len(found)
    assert stats.chisquare(seen, wanted).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_tokens_with_the_share(top_p: float) -> None:
    """Also where it is larger than what is sorted first; and of these all are drawn."""
    shares = softmax(LOGITS.astype(np.float64))
    order = np.argsort(-shares, kind="stable")
    size = int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1
    found = set(draws(3000, temperature=1, top_p=top_p))
    assert found <= set(order[:size].tolist())
    assert len(found) > size * 0.3


def test_the_same_seed_gives_the_same_tokens() -> None:
    assert draws(50, temperature=1) == draws(50, temperature=1)


def test_logprobs_are_the_models_own() -> None:
    """At temperature 1, whatever is sampled with; best first."""
    sampling = Sampling(temperature=0.7, logprobs=3)
    choice = choose(LOGITS, sampling, np.random.default_rng(0))
    logs = np.log(softmax(LOGITS.astype(np.float64)))
    assert choice.logprob == pytest.approx(logs[choice.token])
    assert [token for token, _ in choice.likeliest] == np.argsort(-logs)[:3].tolist()
    assert [value for _, value in choice.likeliest] == pytest.approx(sorted(logs, reverse=True)[:3])
    plain = choose(LOGITS, Sampling(), np.random.default_rng(0))
    assert (plain.logprob, plain.likeliest) == (None, ())
