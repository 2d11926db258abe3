"""The reference and the scores, on a model whose every logit is known: a table indexed by the last token."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits, Session, Tokens
from open_autoglm.errors import CheckpointError
from open_autoglm.files import sha256_file
from open_autoglm.quality.metrics import Comparison, judge, ratio_interval, score
from open_autoglm.quality.reference import (
    EvaluationSet,
    Layout,
    Reference,
    compute_reference,
    continue_greedily,
    golden_prompts,
    log_probs_of,
)
from open_autoglm.quality.texts import TEXTS
from open_autoglm.schemas import PathQuality, Place, QualityReport

VOCAB = 900
LAYOUT = Layout(windows=6, window_tokens=193, prompt_tokens=128, decode_tokens=64, greedy_tokens=8)
PREFILL_TOKENS = LAYOUT.prompt_tokens  # scored per window


@dataclasses.dataclass
class TableSession:
    """A bigram model: the next token's logits depend on the last token only, by ``table[last]``.

    It keeps the contract strictly: it counts its cache, and refuses what does not fit.
    """

    table: Logits
    decode_table: Logits | None = None
    batch_size: int = 1
    max_tokens: int = LAYOUT.window_tokens
    cached: tuple[int, int] = (0, 0)

    def prefill(self, tokens: Tokens) -> Logits:
        self._require_room(*tokens.shape)
        self.cached = (tokens.shape[0], tokens.shape[1])
        return self.table[tokens[:, -1]]

    def decode(self, tokens: Tokens) -> Logits:
        rows, length = self.cached
        assert tokens.shape == (rows,)
        self._require_room(rows, length + 1)
        self.cached = (rows, length + 1)
        return (self.table if self.decode_table is None else self.decode_table)[tokens]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._require_room(*tokens.shape)
        return self.table[tokens]

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...

    def _require_room(self, rows: int, length: int) -> None:
        if rows > self.batch_size or length > self.max_tokens:
            raise ValueError(f"no room for {rows} rows of {length} tokens")


@pytest.fixture(scope="module")
def table() -> Logits:
    return np.random.default_rng(1).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def tokens(table: Logits) -> Tokens:
    """Text that the table model wrote itself, so that every other model is worse at it."""
    generator = np.random.default_rng(8)
    tokens = generator.integers(0, VOCAB, (len(TEXTS), LAYOUT.windows, LAYOUT.window_tokens))
    for position in range(1, LAYOUT.window_tokens):
        logits = table[tokens[:, :, position - 1]]
        # The largest of logits + Gumbel noise is a draw from their softmax.
        tokens[:, :, position] = (logits + generator.gumbel(size=logits.shape)).argmax(axis=-1)
    return tokens


@pytest.fixture(scope="module")
def evaluation_set(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    path = tmp_path_factory.mktemp("quality") / "windows.npy"
    np.save(path, tokens)
    return EvaluationSet(
        path=path, sha256=sha256_file(path), texts=TEXTS, layout=LAYOUT, vocab_size=VOCAB, seed=0
    )


@pytest.fixture(scope="module")
def reference(table: Logits, evaluation_set: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "reference.npz"
    compute_reference(TableSession(table), evaluation_set, path)
    return path


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    log_probs: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return log_probs


def scored_windows(path: PathQuality, positions: int) -> int:
    """How many windows of each text were scored."""
    windows, rest = divmod(path.tokens, len(TEXTS) * positions)
    assert rest == 0
    return windows


def prefill_pairs(tokens: Tokens, path: PathQuality) -> tuple[Tokens, Tokens]:
    """The tokens read and the tokens expected next, ``[texts, windows, positions]``, as far as scored."""
    windows = tokens[:, : scored_windows(path, PREFILL_TOKENS)]
    return windows[:, :, :PREFILL_TOKENS], windows[:, :, 1 : PREFILL_TOKENS + 1]


def decode_pairs(tokens: Tokens, path: PathQuality) -> tuple[Tokens, Tokens]:
    """The same for the decode path."""
    first, last = LAYOUT.prompt_tokens, LAYOUT.prompt_tokens + LAYOUT.decode_tokens
    windows = tokens[:, : scored_windows(path, LAYOUT.decode_tokens)]
    return windows[:, :, first:last], windows[:, :, first + 1 : last + 1]


def noisy(table: Logits, deviation: float) -> Logits:
    """A candidate that is worse than ``table`` everywhere, the more so the larger ``deviation`` is."""
    noise = np.random.default_rng(3).normal(0, deviation, table.shape)
    return (table + noise).astype(np.float32)


def comparison(kept: NDArray[np.float64]) -> Comparison:
    """A comparison of which only the log-likelihood differences matter."""
    same = np.ones(kept.shape, dtype=bool)
    return Comparison(kept.astype(np.float32), np.zeros(kept.shape, np.float32), np.zeros(kept.shape), same)


def perplexity(table: Logits, pairs: tuple[Tokens, Tokens]) -> float:
    return math.exp(-log_softmax(table)[pairs].mean())


def test_the_fake_is_a_session(table: Logits) -> None:
    """The table model offers every method of the session contract."""
    assert isinstance(TableSession(table), Session)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_identical_candidate_keeps_everything(
    table: Logits, evaluation_set: EvaluationSet, reference: Path, batch_size: int
) -> None:
    """The reference judged against itself: ratio 1, KL 0, full agreement, at any batch size."""
    session = TableSession(table, batch_size=batch_size)
    report = score(session, evaluation_set, reference, batch_size=batch_size)
    for path in (report.prefill, report.decode):
        assert path.ratio == 1.0
        assert path.ratio_interval == (1.0, 1.0)
        assert path.kl_divergence == 0.0
        assert path.top1_agreement == 1.0
        assert path.by_text == {"fiction": 1.0, "technical": 1.0}
    assert report.ratio == 1.0
    assert report.finite
    assert report.greedy_same_tokens == (LAYOUT.greedy_tokens,) * len(TEXTS)
    assert report.first_divergence == (LAYOUT.greedy_tokens, LAYOUT.greedy_tokens)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_a_ratio_on_the_limit_is_scored_to_the_end(
    table: Logits, evaluation_set: EvaluationSet, reference: Path, batch_size: int
) -> None:
    """Without a verdict, prefill scores every position of a prompt, decode 64 tokens per window."""
    session = TableSession(table, batch_size=batch_size)
    report = score(session, evaluation_set, reference, batch_size=batch_size, limit=1.0)
    assert scored_windows(report.prefill, PREFILL_TOKENS) == LAYOUT.windows
    assert scored_windows(report.decode, LAYOUT.decode_tokens) == LAYOUT.windows
    assert not report.prefill.clear_of_limit
    assert not report.decode.clear_of_limit


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("windows", [1, 3, LAYOUT.windows + 1])
def test_a_slice_reads_the_first_windows_of_each_text_only(
    table: Logits,
    tokens: Tokens,
    evaluation_set: EvaluationSet,
    reference: Path,
    windows: int,
    batch_size: int,
) -> None:
    """Against the same reference, of which it takes the same windows; more than there are means all."""
    other = noisy(table, 0.7)
    session = TableSession(other, batch_size=batch_size)
    report = score(session, evaluation_set, reference, batch_size=batch_size, limit=0.78, windows=windows)
    read = min(windows, LAYOUT.windows)
    for path, positions, pairs in (
        (report.prefill, PREFILL_TOKENS, prefill_pairs),
        (report.decode, LAYOUT.decode_tokens, decode_pairs),
    ):
        assert scored_windows(path, positions) <= read
        assert path.perplexity == pytest.approx(perplexity(other, pairs(tokens, path)), rel=1e-5)
        assert path.reference_perplexity == pytest.approx(perplexity(table, pairs(tokens, path)), rel=1e-5)
    assert scored_windows(report.decode, LAYOUT.decode_tokens) == read


@pytest.mark.parametrize(("limit", "windows"), [(0.99, 2), (0.5, 2), (0.78, 6)])
def test_each_path_stops_when_its_verdict_is_clear(
    table: Logits, evaluation_set: EvaluationSet, reference: Path, limit: float, windows: int
) -> None:
    """A candidate that keeps 78 % is soon known to miss 99 % and to keep 50 %; at 78 % nothing is known."""
    report = score(TableSession(noisy(table, 0.7)), evaluation_set, reference, limit=limit)
    decode = report.decode
    assert 0.75 < decode.ratio < 0.81
    assert scored_windows(decode, LAYOUT.decode_tokens) == windows
    assert decode.clear_of_limit == (not decode.ratio_interval[0] <= limit <= decode.ratio_interval[1])
    assert decode.clear_of_limit == (windows < LAYOUT.windows)


@pytest.mark.parametrize(("batch_size", "windows"), [(1, 2), (2, 2), (3, 3), (4, 2), (8, 4), (64, 6)])
def test_no_verdict_rests_on_less_than_eight_blocks_of_equally_many_windows(
    table: Logits, evaluation_set: EvaluationSet, reference: Path, batch_size: int, windows: int
) -> None:
    """However clear it is, a verdict waits for 8 blocks, and for each text to be read equally far."""
    session = TableSession(np.zeros_like(table), batch_size=batch_size)
    report = score(session, evaluation_set, reference, batch_size=batch_size)
    assert scored_windows(report.prefill, PREFILL_TOKENS) == 1  # of 4 blocks
    assert scored_windows(report.decode, LAYOUT.decode_tokens) == windows  # of 2 blocks


def test_a_long_evaluation_is_looked_at_ten_times_at_most(evaluation_set: EvaluationSet) -> None:
    """With 25 windows a text, a look comes every three: more looks would make a wrong verdict likelier."""
    layout = LAYOUT.model_copy(update={"windows": 25})
    long = evaluation_set.model_copy(update={"layout": layout})
    parts = [comparison(np.full((1, 512), -1.0)) for _ in range(len(TEXTS) * layout.windows)]
    assert scored_windows(judge(parts, long, limit=0.99), 512) == 3


def test_looking_again_and_again_seldom_ends_in_a_wrong_verdict(evaluation_set: EvaluationSet) -> None:
    """With the truth on the limit, where every verdict is wrong, about 5 % of 400 scorings stop early."""
    generator = np.random.default_rng(7)
    layout = LAYOUT.model_copy(update={"windows": 8})
    default = evaluation_set.model_copy(update={"layout": layout})
    stopped = 0
    for _ in range(400):
        parts = [comparison(row[None]) for row in generator.normal(0, 0.1, (16, 192))]
        stopped += scored_windows(judge(parts, default, limit=1.0), 192) < layout.windows
    assert 0.01 < stopped / 400 < 0.08


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexities_are_those_computed_by_hand(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path, batch_size: int
) -> None:
    """A candidate with noisy logits gets, on each path, the perplexity the definition gives."""
    other = noisy(table, 1.0)
    session = TableSession(other, batch_size=batch_size)
    report = score(session, evaluation_set, reference, batch_size=batch_size)
    everything = len(TEXTS) * LAYOUT.windows * PREFILL_TOKENS
    assert report.prefill.tokens < everything, "nothing is learnt about where scoring stopped"
    for path, pairs in (
        (report.prefill, prefill_pairs(tokens, report.prefill)),
        (report.decode, decode_pairs(tokens, report.decode)),
    ):
        ours, theirs = perplexity(other, pairs), perplexity(table, pairs)
        assert path.perplexity == pytest.approx(ours, rel=1e-5)
        assert path.reference_perplexity == pytest.approx(theirs, rel=1e-5)
        assert path.ratio == pytest.approx(theirs / ours, rel=1e-5)
        assert path.ratio_interval[0] < path.ratio < path.ratio_interval[1]
        agree = (other.argmax(axis=-1) == table.argmax(axis=-1))[pairs[0]].mean()
        assert path.top1_agreement == pytest.approx(agree)
        low, high = path.flips_interval
        assert low < path.token_flips < high
        for index, kind in enumerate(TEXTS):
            there = (pairs[0][index], pairs[1][index])
            expected = perplexity(table, there) / perplexity(other, there)
            assert path.by_text[kind] == pytest.approx(expected, rel=1e-5)


def test_a_candidate_that_knows_nothing_has_the_vocabulary_as_perplexity(
    table: Logits, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """Equal logits for all tokens give a perplexity of exactly the vocabulary size."""
    report = score(TableSession(np.zeros_like(table)), evaluation_set, reference)
    assert report.prefill.perplexity == pytest.approx(VOCAB)
    assert report.decode.perplexity == pytest.approx(VOCAB)


def test_kl_is_a_tight_lower_bound(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """KL over 256 tokens and one bin never exceeds the exact KL, and is most of it."""
    other = noisy(table, 0.5)
    p, q = log_softmax(table), log_softmax(other)
    prefill = score(TableSession(other), evaluation_set, reference).prefill
    exact = (np.exp(p) * (p - q)).sum(axis=-1)[prefill_pairs(tokens, prefill)[0]].mean()
    assert 0.8 * exact < prefill.kl_divergence <= exact


def test_kl_is_exact_when_the_kept_tokens_are_the_vocabulary(tmp_path: Path) -> None:
    """With a vocabulary of no more than 256 tokens nothing is merged, so the bound is the divergence."""
    generator = np.random.default_rng(5)
    table, other = generator.normal(0, 2, (2, 200, 200)).astype(np.float32)
    tokens = generator.integers(0, 200, (len(TEXTS), LAYOUT.windows, LAYOUT.window_tokens))
    np.save(tmp_path / "windows.npy", tokens)
    small = EvaluationSet(
        path=tmp_path / "windows.npy",
        sha256=sha256_file(tmp_path / "windows.npy"),
        texts=TEXTS,
        layout=LAYOUT,
        vocab_size=200,
        seed=0,
    )
    compute_reference(TableSession(table), small, tmp_path / "reference.npz")
    p, q = log_softmax(table), log_softmax(other)
    prefill = score(TableSession(other), small, tmp_path / "reference.npz").prefill
    exact = (np.exp(p) * (p - q)).sum(axis=-1)[prefill_pairs(tokens, prefill)[0]].mean()
    assert prefill.kl_divergence == pytest.approx(exact, rel=1e-4)


def test_the_worse_path_gates(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """A candidate whose decode kernels are wrong is judged by them, however good its prefill is."""
    wrong = np.roll(table, 1, axis=1)
    report = score(TableSession(table, decode_table=wrong), evaluation_set, reference)
    pairs = decode_pairs(tokens, report.decode)
    assert report.prefill.ratio == 1.0
    assert report.worse_path == "decode"
    assert report.ratio == pytest.approx(perplexity(table, pairs) / perplexity(wrong, pairs), rel=1e-5)
    # Only the first greedy token comes from prefill.
    assert set(report.greedy_same_tokens) == {1}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_non_finite_logits_are_reported_not_raised(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path, path: str, poison: float
) -> None:
    """One NaN or infinity on either path: not finite, ratio 0, and a report that survives JSON."""
    sick = table.copy()
    read = 3 if path == "prefill" else LAYOUT.prompt_tokens + 3
    sick[tokens[0, 0, read], 7] = poison
    tables = (sick, table) if path == "prefill" else (table, sick)
    session = TableSession(tables[0], decode_table=tables[1])
    report = score(session, evaluation_set, reference)
    assert not report.finite
    told = f"{path} gave logits that are not finite, first at position {first_read(tokens, path, read)} of "
    assert report.not_finite == f"{told}window 0 of {TEXTS[0]}"
    assert report.ratio == 0.0
    assert report.decode.tokens == 0
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def first_read(tokens: Tokens, path: str, read: int) -> int:
    """Where the token at ``read`` of the very first window is read first by that path."""
    start = 0 if path == "prefill" else LAYOUT.prompt_tokens
    return start + int((tokens[0, 0, start:] == tokens[0, 0, read]).argmax())


def test_the_first_flip_is_where_the_tables_differ(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """On each path by itself, counted from the window's begin; None where all likeliest tokens agree."""
    read = LAYOUT.prompt_tokens + 5
    other = table.copy()
    other[tokens[0, 0, read]] *= -1
    report = score(TableSession(table, decode_table=other), evaluation_set, reference)
    expected = Place(text=TEXTS[0], window=0, position=first_read(tokens, "decode", read))
    assert (report.prefill.first_flip, report.decode.first_flip) == (None, expected)
    assert report.flipping_path == "decode"
    assert report.flipping.token_flips > 0


@pytest.mark.parametrize(("share", "windows"), [(0.02, 1), (0.1, 6), (0.3, 1)])
def test_scoring_goes_on_until_the_verdict_on_flips_is_clear(
    evaluation_set: EvaluationSet, share: float, windows: int
) -> None:
    """However clear the perplexity is: 10 % of flips against a limit of 10 % tell nothing."""
    generator = np.random.default_rng(8)
    count = len(TEXTS) * LAYOUT.windows
    rows = generator.random((count, 128)) < share
    parts = [comparison(np.zeros((1, 128)))._replace(agrees=~row[None]) for row in rows]
    found = judge(parts, evaluation_set, 0.99, 0.1)
    assert found.clear_of_limit
    assert scored_windows(found, 128) == windows
    assert found.clear_of_flips == (windows < LAYOUT.windows)


def test_absurd_logits_stay_within_json(
    table: Logits, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """Finite logits so wrong that the perplexity overflows still give a report of finite numbers."""
    report = score(TableSession(-1e4 * table), evaluation_set, reference)
    assert report.finite
    assert report.ratio == 0.0
    assert math.isfinite(report.prefill.perplexity)
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def test_logits_of_a_wrong_shape_are_refused(
    table: Logits, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """A session that returns fewer logits than the contract says is an error, not a score."""
    with pytest.raises(ValueError, match=r"shape \(1, 128, 100\), expected \(1, 128, 900\)"):
        score(TableSession(table[:, :100]), evaluation_set, reference)


def test_a_sick_reference_is_the_checkpoints_fault(
    table: Logits, evaluation_set: EvaluationSet, tmp_path: Path
) -> None:
    """NaN in the fp32 logits is reported as damaged weights, and no reference file is left."""
    with pytest.raises(CheckpointError, match="weights hold NaN or infinity"):
        compute_reference(TableSession(np.full_like(table, math.nan)), evaluation_set, tmp_path / "r.npz")
    assert not list(tmp_path.iterdir())


def test_a_reference_of_another_evaluation_set_is_refused(
    evaluation_set: EvaluationSet, reference: Path
) -> None:
    """Scores are never taken against the predictions for other tokens."""
    other = evaluation_set.model_copy(update={"sha256": "f" * 64})
    with pytest.raises(ValueError, match="belongs to another evaluation set"):
        Reference.load(reference, other)
    with pytest.raises(ValueError, match="has changed"):
        other.load()


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Over 400 draws of correlated differences, the 95 % interval holds the truth about 95 % of the time."""
    generator = np.random.default_rng(6)
    kernel = np.ones(4) / 4  # neighbouring tokens correlate, blocks hardly
    held = 0
    for _ in range(400):
        noise = generator.normal(-0.01, 0.3, (8, 259))
        kept = np.stack([np.convolve(row, kernel, mode="valid") for row in noise])
        low, high = ratio_interval(kept)
        held += low <= math.exp(-0.01) <= high
    assert 0.91 < held / 400 < 0.98


def test_log_probs_do_not_overflow() -> None:
    """Large logits give the same log-probabilities as shifted ones."""
    logits = np.array([[1000.0, 1001.0, 998.0]], dtype=np.float32)
    ids = np.array([[0, 1, 2]])
    expected = log_softmax(np.array([[0.0, 1.0, -2.0]], dtype=np.float32))
    assert log_probs_of(logits, ids) == pytest.approx(expected, rel=1e-6)


# ── drafts ───────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class VerifyingSession(TableSession):
    """The same with means to verify drafts, by a table of its own."""

    verify_table: Logits | None = None

    def extend(self, tokens: Tokens) -> Logits:
        rows, length = self.cached
        assert rows == len(tokens) == 1
        assert tokens.shape[1] > 1, "kernels for one row are others"
        self._require_room(rows, length + tokens.shape[1])
        self.cached = (rows, length + tokens.shape[1])
        return (self.table if self.verify_table is None else self.verify_table)[tokens]

    def rewind(self, tokens: int) -> None:
        rows, length = self.cached
        assert 0 <= tokens <= length
        self.cached = (rows, length - tokens)


def test_with_drafts_decoding_is_judged_as_it_is_done(
    table: Logits, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """By the call that verifies drafts: `decode` is not called by such a candidate and may say anything."""
    nonsense = np.random.default_rng(5).normal(0, 2, table.shape).astype(np.float32)
    exact = score(VerifyingSession(table, decode_table=nonsense), evaluation_set, reference, draft_tokens=7)
    assert exact.ratio == pytest.approx(1, abs=1e-5)
    assert exact.decode.tokens >= LAYOUT.decode_tokens * len(TEXTS)
    assert exact.decode.tokens % LAYOUT.decode_tokens == 0
    assert exact.greedy_same_tokens == exact.draft_same_tokens == (LAYOUT.greedy_tokens,) * len(TEXTS)
    wrong = score(VerifyingSession(table, verify_table=nonsense), evaluation_set, reference, draft_tokens=7)
    assert wrong.worse_path == "decode"
    assert wrong.ratio < 0.5
    assert score(TableSession(table), evaluation_set, reference).draft_same_tokens is None


def test_not_finite_while_verifying_is_located(
    table: Logits, evaluation_set: EvaluationSet, reference: Path, tokens: Tokens
) -> None:
    """The position within a call of several."""
    at = LAYOUT.prompt_tokens + 5
    broken = table.copy()
    broken[tokens[0, 0, at]] = np.nan
    report = score(VerifyingSession(table, verify_table=broken), evaluation_set, reference, draft_tokens=3)
    assert not report.finite
    assert report.draft_same_tokens is None
    first = int(np.flatnonzero(tokens[0, 0, LAYOUT.prompt_tokens :] == tokens[0, 0, at])[0])
    place = Place(text=TEXTS[0], window=0, position=LAYOUT.prompt_tokens + first)
    assert str(place) in report.not_finite


# ── golden prompts ───────────────────────────────────────────────────────────────────────────────


def test_golden_prompts_are_what_was_continued(
    table: Logits, tokens: Tokens, evaluation_set: EvaluationSet, reference: Path
) -> None:
    """The beginning of each text's first window, with what the reference says next, and what of it the
    report says the candidate said too."""
    report = score(TableSession(noisy(table, 0.7)), evaluation_set, reference)
    golden = golden_prompts(evaluation_set, reference, report.greedy_same_tokens)
    assert [one.same_tokens for one in golden] == list(report.greedy_same_tokens)
    for one, text in zip(golden, tokens, strict=True):
        assert list(one.prompt) == text[0, : LAYOUT.prompt_tokens].tolist()
        said = continue_greedily(TableSession(table), np.array([one.prompt]), LAYOUT.greedy_tokens)
        assert list(one.answer) == said[0].tolist()
