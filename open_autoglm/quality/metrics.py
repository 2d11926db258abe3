"""How much of the reference's quality a candidate keeps, on each of the two paths it will be served by.

A prompt is read by one batched call, an answer is written one token at a time (or a few, where drafts are
verified), and the kernels differ: dynamic int8 kept 64 % of the demo model's quality on one path, 92 % on
the other. So both are scored, on the same windows, and the worse one counts. The share kept is reference
perplexity / candidate perplexity, held to 99 % by default as in the MLPerf Inference rules; next to it stand
the mean KL divergence and the top-1 agreement that llama.cpp's ``tools/perplexity`` reports (there: "Mean
KLD", "Same top p").
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits, Session, Tokens, Verifier
from open_autoglm.quality.reference import (
    ROWS_AT_A_TIME,
    EvaluationSet,
    NonFiniteError,
    Predictions,
    Reference,
    all_logits,
    continue_greedily,
    log_probs_of,
    require_finite,
    require_shape,
    slices,
)
from open_autoglm.schemas import PathQuality, Phase, Place, QualityReport

BLOCK_TOKENS = 32
LEAST_BLOCKS = 8  # the spread of fewer means is hardly known
MOST_LOOKS = 10
LOOK_CONFIDENCE = 0.99
"""Wider than the 95 % reported, because of optional stopping: many looks err more often than each of them.

If the truth lies on the limit itself, ten looks at 99 % find it off the limit in about 5 % of cases
(Pocock, *Biometrika* 64, 1977, p. 191), so stopping early is as safe as one look at 95 %. Two things
remain. What is not settled early is looked at once more at the end, at 95 %, for ``clear_of_limit``: with
that, about 8 %. And where scoring stopped early, the ratio leans a little away from the limit.
"""
_LARGEST_EXPONENT = 700.0  # exp of more overflows; JSON has no infinity
_LEAST_REST = 1e-6  # the sum of 256 float32 probabilities is not known more exactly than this


class Comparison(NamedTuple):
    """Candidate against reference at each position, all of one shape."""

    log_prob: NDArray[np.float32]
    """The candidate's, of the true next token, in nats."""
    reference_log_prob: NDArray[np.float32]
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]

    @property
    def kept(self) -> NDArray[np.float64]:
        """The reference's negative log-likelihood - the candidate's, in nats."""
        return self.log_prob.astype(np.float64) - self.reference_log_prob


def score(
    session: Session,
    evaluation_set: EvaluationSet,
    reference: Path,
    *,
    batch_size: int = 1,
    limit: float = 0.99,
    max_flips: float = 0.1,
    windows: int | None = None,
    draft_tokens: int = 0,
) -> QualityReport:
    """Judge ``session`` on ``evaluation_set`` against the file `compute_reference` wrote.

    ``windows`` of each text are read at most; None means all.

    Each path is read until it is clear on which side of ``limit`` its ratio lies and on which side of
    ``max_flips`` the share of positions whose likeliest token is another, or to the end. The
    prefill path reads one prompt per call; the decode path advances up to ``batch_size`` windows
    together, which must not exceed the session's own, or with ``draft_tokens`` one window by so many and one
    at a time, as drafts that are right would. NaN or infinity in any logits ends the scoring:
    the report then has ``finite=False``, where it was, ratio 0 and no scored tokens. Raises ValueError if
    the logits do not have the shape the contract promises or the reference belongs to another evaluation set.
    """
    started = time.monotonic()
    expected, texts = Reference.load(reference, evaluation_set), evaluation_set.texts
    evaluation_set = evaluation_set.first(windows)
    tokens, some = evaluation_set.load(), np.s_[:, : evaluation_set.layout.windows]
    predictions = Predictions(*map(_in_turn, expected.predictions.at(some)))
    ordered = _in_turn(tokens)
    not_finite = ""
    try:
        sliced = windows is not None
        read = _prefill(session, evaluation_set, ordered, predictions)
        prefill = judge(read, evaluation_set, limit, max_flips, sliced=sliced)
        if draft_tokens:
            stepwise = _verify(session, evaluation_set, ordered, predictions, draft_tokens + 1)
        else:
            stepwise = _decode(session, evaluation_set, ordered, predictions, batch_size)
        start = evaluation_set.layout.prompt_tokens
        decode = judge(stepwise, evaluation_set, limit, max_flips, start=start, sliced=sliced)
        same, drafts_same = _same_greedy_tokens(
            session, evaluation_set, tokens, expected, batch_size, draft_tokens
        )
    except NonFiniteError as error:
        prefill = decode = _unscored(texts)
        drafts_same = None
        same = (0,) * len(texts)
        not_finite = str(error)
    return QualityReport(
        prefill=prefill,
        decode=decode,
        worse_path="decode" if decode.ratio < prefill.ratio else "prefill",
        ratio=min(prefill.ratio, decode.ratio),
        greedy_same_tokens=same,
        draft_same_tokens=drafts_same,
        greedy_tokens=evaluation_set.layout.greedy_tokens,
        finite=not not_finite,
        not_finite=not_finite,
        seconds=time.monotonic() - started,
    )


def _in_turn(array: NDArray[Any]) -> NDArray[Any]:
    """``[texts, windows, ...]`` → ``[rows, ...]``: the first window of each text, then the second of each."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])


def _prefill(
    session: Session, evaluation_set: EvaluationSet, windows: Tokens, expected: Predictions
) -> Iterator[Comparison]:
    """Every prompt position of ``windows[rows, n]``, each prompt in one call."""
    count, texts = evaluation_set.layout.prompt_tokens, evaluation_set.texts
    for row, window in enumerate(windows):
        logits = all_logits(session, window[:count], evaluation_set.vocab_size)
        with _locating(logits, "prefill", texts, [(row, position) for position in range(count)]):
            compared = compare(logits, window[1 : count + 1], expected.at((row, slice(count))))
        del logits  # or two windows' worth of them would be held during the next pass
        yield _stack([compared], axis=0)


def _decode(
    session: Session, evaluation_set: EvaluationSet, windows: Tokens, expected: Predictions, batch_size: int
) -> Iterator[Comparison]:
    """The true tokens of ``windows[rows, n]``, fed one per call; only what `decode` returns is scored."""
    positions, texts = evaluation_set.layout.decode_positions, evaluation_set.texts
    for rows in slices(len(windows), batch_size):
        numbers = range(rows.start, rows.stop)
        logits = session.prefill(windows[rows, : positions.start])
        with _locating(logits, "prefill", texts, [(row, positions.start - 1) for row in numbers]):
            require_finite(logits)
        steps = []
        for position in range(positions.start, positions.stop):
            logits = session.decode(windows[rows, position])
            require_shape(logits, (rows.stop - rows.start, evaluation_set.vocab_size))
            with _locating(logits, "decode", texts, [(row, position) for row in numbers]):
                steps.append(compare(logits, windows[rows, position + 1], expected.at((rows, position))))
        yield _stack(steps, axis=1)


def _verify(
    session: Session, evaluation_set: EvaluationSet, windows: Tokens, expected: Predictions, count: int
) -> Iterator[Comparison]:
    """The true tokens of ``windows[rows, n]``, fed ``count`` per call; what `extend` returns is scored."""
    positions, texts = evaluation_set.layout.decode_positions, evaluation_set.texts
    assert isinstance(session, Verifier), "an engine that offers drafts can verify them"
    for row, window in enumerate(windows):
        session.prefill(window[None, : positions.start])
        steps = []
        for start in range(positions.start, positions.stop, count):
            stop = min(start + count, positions.stop)
            logits = session.extend(window[None, start:stop])
            require_shape(logits, (1, stop - start, evaluation_set.vocab_size))
            with _locating(logits[0], "decode", texts, [(row, position) for position in range(start, stop)]):
                true, there = window[start + 1 : stop + 1], expected.at((row, slice(start, stop)))
                steps.append(compare(logits[0], true, there))
        yield _stack([_joined(steps)], axis=0)


@contextmanager
def _locating(
    logits: Logits, path: Phase, texts: Sequence[str], places: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Let a NonFiniteError about ``logits[n, vocab]`` say where; ``places``: n rows with positions."""
    try:
        yield
    except NonFiniteError as error:
        first = _place(texts, *places[int(np.isfinite(logits).all(axis=-1).argmin())])
        raise NonFiniteError(f"{path} gave logits that are not finite, first at {first}") from error


def _place(texts: Sequence[str], row: int, position: int) -> Place:
    """A position of the windows in turn, by its text."""
    return Place(text=texts[row % len(texts)], window=row // len(texts), position=position)


def _stack(parts: Sequence[Comparison], axis: int) -> Comparison:
    return Comparison(*(np.stack(arrays, axis=axis) for arrays in zip(*parts, strict=True)))


def judge(
    parts: Iterable[Comparison],
    evaluation_set: EvaluationSet,
    limit: float,
    max_flips: float = 0.1,
    *,
    start: int = 0,
    sliced: bool = False,
) -> PathQuality:
    """Take ``parts``, each ``[rows, positions]`` from position ``start`` on, until the verdicts on the
    ``limit`` of quality and on ``max_flips`` are clear.

    A look is only taken when every text has been read equally far. A slice is one look more, so it is
    clear of a limit only by the stricter rule for looks.
    """
    step = len(evaluation_set.texts) * math.ceil(evaluation_set.layout.windows / MOST_LOOKS)
    taken: list[Comparison] = []
    rows = 0
    for part in parts:
        taken.append(part)
        rows += len(part.kl)
        if rows % step == 0 and all(_settled(_joined(taken), limit, max_flips).values()):
            break
    scored = _joined(taken)
    found = summarise(scored, evaluation_set.texts, limit, max_flips, start)
    return found.model_copy(update=_settled(scored, limit, max_flips)) if sliced else found


def _joined(parts: Sequence[Comparison]) -> Comparison:
    return Comparison(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _settled(scored: Comparison, limit: float, max_flips: float) -> dict[str, bool]:
    """One look: does what was ``scored`` tell on which side of each limit it is? By PathQuality's fields."""
    rows, positions = scored.agrees.shape
    enough = rows * blocks_of(positions) >= LEAST_BLOCKS
    return {
        "clear_of_limit": enough and excludes(ratio_interval(scored.kept, LOOK_CONFIDENCE), limit),
        "clear_of_flips": enough and excludes(mean_interval(~scored.agrees, LOOK_CONFIDENCE), max_flips),
    }


def _same_greedy_tokens(
    session: Session,
    evaluation_set: EvaluationSet,
    tokens: Tokens,
    expected: Reference,
    batch_size: int,
    draft_tokens: int,
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """How many leading tokens of each text's greedy continuation are the reference's and, where there are
    drafts, how many are the same with the shortest of them: none may depend on what was guessed."""
    prompts = tokens[:, 0, : evaluation_set.layout.prompt_tokens]

    def continued(drafts: int) -> Tokens:
        groups = [
            continue_greedily(session, prompts[rows], evaluation_set.layout.greedy_tokens, drafts)
            for rows in slices(len(prompts), 1 if drafts else batch_size)
        ]
        return np.concatenate(groups)

    served = continued(draft_tokens)
    return _alike(served, expected.greedy), _alike(served, continued(1)) if draft_tokens else None


def _alike(found: Tokens, expected: Tokens) -> tuple[int, ...]:
    """Leading tokens that are the same, per row of ``[rows, n]``."""
    return tuple(int(count) for count in np.logical_and.accumulate(found == expected, axis=1).sum(axis=1))


def compare(logits: Logits, targets: Tokens, expected: Predictions) -> Comparison:
    """Compare ``logits[n, vocab]`` with the reference's predictions ``[n]`` about ``targets[n]``."""
    parts = []
    for rows in slices(len(targets), ROWS_AT_A_TIME):
        some, there = logits[rows], expected.at(rows)
        ids = np.concatenate([targets[rows, None], there.top_ids], axis=1)
        log_probs = log_probs_of(some, ids)
        kl = coarse_kl(there.top_log_probs, log_probs[:, 1:])
        agrees = some.argmax(axis=-1) == there.top1
        parts.append(Comparison(log_probs[:, 0], there.log_prob, kl, agrees))
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
    scored: Comparison, texts: Sequence[str], limit: float, max_flips: float, start: int
) -> PathQuality:
    """Pool comparisons ``[rows, positions]`` from position ``start`` on, where every ``len(texts)`` rows are
    one of each text."""
    kept, flips = scored.kept, ~scored.agrees
    interval, flips_interval = ratio_interval(kept), mean_interval(flips)
    first = next(((int(row), start + int(at)) for row, at in np.argwhere(flips)), None)
    by_text = [_exp(kept[first :: len(texts)].mean()) for first in range(len(texts))]
    return PathQuality(
        tokens=kept.size,
        perplexity=_exp(-scored.log_prob.mean(dtype=np.float64)),
        reference_perplexity=_exp(-scored.reference_log_prob.mean(dtype=np.float64)),
        ratio=_exp(kept.mean()),
        ratio_interval=interval,
        clear_of_limit=excludes(interval, limit),
        kl_divergence=max(0.0, float(scored.kl.mean())),
        top1_agreement=float(scored.agrees.mean()),
        flips_interval=flips_interval,
        clear_of_flips=excludes(flips_interval, max_flips),
        first_flip=_place(texts, *first) if first else None,
        by_text=dict(zip(texts, by_text, strict=True)),
    )


def ratio_interval(kept: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of ``exp(mean(kept))`` for log-likelihood differences ``kept[rows, positions]``."""
    low, high = mean_interval(kept, confidence)
    return _exp(low), _exp(high)


def mean_interval(
    values: NDArray[np.float64] | NDArray[np.bool_], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of ``values[rows, positions]``.

    What neighbouring tokens give is correlated, so the samples are means over blocks of at least
    32 consecutive tokens of one window (the method of batch means), and Student's t is taken over those.
    """
    from scipy.special import stdtrit

    blocks = np.array_split(values, blocks_of(values.shape[1]), axis=1)
    means = np.concatenate([block.mean(axis=1) for block in blocks])
    error = means.std(ddof=1) / math.sqrt(len(means))
    margin = float(stdtrit(len(means) - 1, (1 + confidence) / 2) * error)
    middle = float(values.mean())
    return middle - margin, middle + margin


def blocks_of(positions: int) -> int:
    """How many blocks that many consecutive tokens are cut into."""
    return max(1, positions // BLOCK_TOKENS)


def excludes(interval: tuple[float, float], limit: float) -> bool:
    """Whether ``interval`` lies wholly on one side of ``limit``."""
    return limit < interval[0] or interval[1] < limit


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _LARGEST_EXPONENT))


def _unscored(texts: Sequence[str]) -> PathQuality:
    """Nothing could be scored: no tokens, nothing kept, and a KL divergence of 0 that is no agreement."""
    return PathQuality(
        tokens=0,
        perplexity=0.0,
        reference_perplexity=0.0,
        ratio=0.0,
        ratio_interval=(0.0, 0.0),
        clear_of_limit=True,
        kl_divergence=0.0,
        top1_agreement=0.0,
        by_text=dict.fromkeys(texts, 0.0),
    )
