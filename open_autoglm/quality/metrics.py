"""How much of the reference's quality a candidate keeps, on each of the two paths it will be served by.

A prompt is read by one batched call, an answer is written one token at a time, and the kernels differ:
dynamic int8 raised perplexity by 51 % on one path and by 1.5 % on the other. So both are scored, on the
same text, and the worse one counts. The share kept is reference perplexity / candidate perplexity, held to
99 % by default as in the MLPerf Inference rules; next to it stand the mean KL divergence and the top-1
agreement that llama.cpp's ``tools/perplexity`` reports (there: "Mean KLD", "Same top p").
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits, Session, Tokens
from open_autoglm.quality.reference import (
    ROWS_AT_A_TIME,
    EvaluationSet,
    NonFiniteError,
    Predictions,
    Reference,
    continue_greedily,
    log_probs_of,
    next_token_logits,
    require_finite,
    require_shape,
    slices,
)
from open_autoglm.schemas import PathQuality, QualityReport

BLOCK_TOKENS = 32
_LARGEST_EXPONENT = 700.0  # exp of more overflows; JSON has no infinity
_LEAST_REST = 1e-6  # the sum of 256 float32 probabilities is not known more exactly than this


class Comparison(NamedTuple):
    """Candidate against reference at each position, all of one shape."""

    log_prob: NDArray[np.float32]
    """The candidate's, of the true next token, in nats."""
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]


def score(
    session: Session, evaluation_set: EvaluationSet, reference: Path, batch_size: int = 1
) -> QualityReport:
    """Judge ``session`` on ``evaluation_set`` against the file `compute_reference` wrote.

    The prefill path reads one window per call; the decode path advances up to ``batch_size`` windows
    together, which must not exceed the session's own. NaN or infinity in any logits ends the scoring:
    the report then has ``finite=False``, ratio 0 and no scored tokens. Raises ValueError if the logits
    do not have the shape the contract promises or the reference belongs to another evaluation set.
    """
    started = time.monotonic()
    expected = Reference.load(reference, evaluation_set)
    tokens = evaluation_set.load()
    try:
        prefill = _score_prefill(session, evaluation_set, tokens, expected)
        decode = _score_decode(session, evaluation_set, tokens, expected, batch_size)
        same = _same_greedy_tokens(session, evaluation_set, tokens, expected, batch_size)
    except NonFiniteError:
        prefill = decode = _unscored(evaluation_set.texts)
        same = (0,) * len(evaluation_set.texts)
        finite = False
    else:
        finite = True
    return QualityReport(
        prefill=prefill,
        decode=decode,
        worse_path="decode" if decode.ratio < prefill.ratio else "prefill",
        ratio=min(prefill.ratio, decode.ratio),
        greedy_same_tokens=same,
        greedy_tokens=evaluation_set.layout.greedy_tokens,
        finite=finite,
        seconds=time.monotonic() - started,
    )


def _score_prefill(
    session: Session, evaluation_set: EvaluationSet, tokens: Tokens, expected: Reference
) -> PathQuality:
    """Every position of every window, each window in one call."""
    windows, predictions = _first_windows(tokens, expected, evaluation_set.layout.windows)
    parts = []
    for index, window in enumerate(windows):
        logits = next_token_logits(session, window, evaluation_set.vocab_size)
        parts.append(compare(logits, window[1:], predictions.at(index)))
        del logits  # or two windows' worth of them would be held during the next pass
    scored = Comparison(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))
    return summarise(scored, predictions.log_prob, evaluation_set.texts)


def _score_decode(
    session: Session, evaluation_set: EvaluationSet, tokens: Tokens, expected: Reference, batch_size: int
) -> PathQuality:
    """The true tokens of the decode windows, fed one per call; only what `decode` returns is scored."""
    windows, predictions = _first_windows(tokens, expected, evaluation_set.layout.decode_windows)
    positions = evaluation_set.layout.decode_positions
    groups = []
    for rows in slices(len(windows), batch_size):
        require_finite(session.prefill(windows[rows, : positions.start]))
        steps = []
        for position in range(positions.start, positions.stop):
            logits = session.decode(windows[rows, position])
            require_shape(logits, (rows.stop - rows.start, evaluation_set.vocab_size))
            steps.append(compare(logits, windows[rows, position + 1], predictions.at((rows, position))))
        groups.append([np.stack(arrays, axis=1) for arrays in zip(*steps, strict=True)])
    scored = Comparison(*(np.concatenate(arrays) for arrays in zip(*groups, strict=True)))
    return summarise(scored, predictions.log_prob[:, positions], evaluation_set.texts)


def _first_windows(tokens: Tokens, expected: Reference, count: int) -> tuple[Tokens, Predictions]:
    """The first ``count`` windows of each text, one text after the other, and the predictions there."""
    first = np.divmod(np.arange(len(tokens) * count), count)
    return tokens[first], expected.predictions.at(first)


def _same_greedy_tokens(
    session: Session, evaluation_set: EvaluationSet, tokens: Tokens, expected: Reference, batch_size: int
) -> tuple[int, ...]:
    """How many leading tokens of each text's greedy continuation are the reference's."""
    prompts = tokens[:, 0, : evaluation_set.layout.prompt_tokens]
    groups = [
        continue_greedily(session, prompts[rows], evaluation_set.layout.greedy_tokens)
        for rows in slices(len(prompts), batch_size)
    ]
    same = np.concatenate(groups) == expected.greedy
    return tuple(int(count) for count in np.logical_and.accumulate(same, axis=1).sum(axis=1))


def compare(logits: Logits, targets: Tokens, expected: Predictions) -> Comparison:
    """Compare ``logits[n, vocab]`` with the reference's predictions ``[n]`` about ``targets[n]``."""
    parts = []
    for rows in slices(len(targets), ROWS_AT_A_TIME):
        some, there = logits[rows], expected.at(rows)
        ids = np.concatenate([targets[rows, None], there.top_ids], axis=1)
        log_probs = log_probs_of(some, ids)
        kl = coarse_kl(there.top_log_probs, log_probs[:, 1:])
        parts.append(Comparison(log_probs[:, 0], kl, some.argmax(axis=-1) == there.top1))
    return Comparison(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def coarse_kl(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference‖candidate) in nats over the given tokens and one bin for all others: ``[n, k]`` → ``[n]``.

    Merging outcomes can only lower a divergence (the log-sum inequality; Cover & Thomas, *Elements of
    Information Theory*, 2nd ed., theorem 2.7.1), so this is a lower bound on the divergence over the
    whole vocabulary.
    """
    p_log, q_log = reference.astype(np.float64), candidate.astype(np.float64)
    p, q = np.exp(p_log), np.exp(q_log)
    p_rest = np.maximum(1 - p.sum(axis=-1), _LEAST_REST)
    q_rest = np.maximum(1 - q.sum(axis=-1), _LEAST_REST)
    divergence: NDArray[np.float64] = (p * (p_log - q_log)).sum(axis=-1) + p_rest * np.log(p_rest / q_rest)
    return divergence


def summarise(
    scored: Comparison, reference_log_prob: NDArray[np.float32], texts: Sequence[str]
) -> PathQuality:
    """Pool comparisons ``[windows, positions]``, where ``windows`` lists the texts one after the other."""
    candidate = scored.log_prob.astype(np.float64)
    expected = reference_log_prob.astype(np.float64)
    kept = candidate - expected  # = reference's negative log-likelihood - candidate's
    return PathQuality(
        tokens=kept.size,
        perplexity=_exp(-candidate.mean()),
        reference_perplexity=_exp(-expected.mean()),
        ratio=_exp(kept.mean()),
        ratio_interval=ratio_interval(kept),
        kl_divergence=max(0.0, float(scored.kl.mean())),
        top1_agreement=float(scored.agrees.mean()),
        by_text=dict(zip(texts, map(_exp, kept.reshape(len(texts), -1).mean(axis=1)), strict=True)),
    )


def ratio_interval(kept: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of ``exp(mean(kept))`` for log-likelihood differences ``kept[windows, positions]``.

    Differences at neighbouring tokens are correlated, so the samples are means over blocks of at least
    32 consecutive tokens of one window (the method of batch means), and Student's t is taken over those.
    """
    from scipy.special import stdtrit

    blocks = np.array_split(kept, max(1, kept.shape[1] // BLOCK_TOKENS), axis=1)
    means = np.concatenate([block.mean(axis=1) for block in blocks])
    error = means.std(ddof=1) / math.sqrt(len(means))
    margin = float(stdtrit(len(means) - 1, 0.975)) * error
    return _exp(kept.mean() - margin), _exp(kept.mean() + margin)


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _LARGEST_EXPONENT))


def _unscored(texts: Sequence[str]) -> PathQuality:
    """Nothing could be scored: no tokens, and nothing kept."""
    return PathQuality(
        tokens=0,
        perplexity=0.0,
        reference_perplexity=0.0,
        ratio=0.0,
        ratio_interval=(0.0, 0.0),
        kl_divergence=0.0,
        top1_agreement=0.0,
        by_text=dict.fromkeys(texts, 0.0),
    )
