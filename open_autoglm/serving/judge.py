"""Whether a challenger is to answer everybody, by what it did beside the champion.

What is wrong beyond excuse ends the trial at once: NaN, crashes, a broken promise of latency. Otherwise both
are compared on the shadow pairs, by the study's own statistics: the paired log ratios of
:mod:`open_autoglm.measure.comparison` for time, and for quality how often both give the same first token.

Who looks at the figures after every pair and stops as soon as they please finds a difference where there is
none (Armitage, McPherson and Rowe, *J. R. Stat. Soc. A* 132, 1969). So there are a few looks, at fixed
numbers of pairs, and each is held to its share of the error that all may make together (Bonferroni). A
verdict depends on the pairs alone and not on when it was asked for.

Where pairs do not come, since somebody is always being answered or nobody asks, the trial ends after a day,
which has every service's quietest hour. Nothing was shown, so the champion stays. Clients' own answers are no
way out: the champion gives most of them, and who shares an engine with more callers is slower for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from open_autoglm.measure.comparison import LEAST_PAIRS, compare
from open_autoglm.measure.statistics import chance_of_so_few
from open_autoglm.schemas import Comparison, Model, QualityReport
from open_autoglm.serving.shadow import Pair, Side

VerdictKind = Literal["promote", "rollback", "wait"]
Times = Literal["ttft_ms", "tpot_ms", "e2e_ms"]
CLIENT_LOOKS = tuple(25 * 2**doubled for doubled in range(10))
"""Answers to the challenger's own clients after which a promise of latency may be found broken."""
TIMES: tuple[Times, ...] = ("ttft_ms", "tpot_ms", "e2e_ms")


class Policy(Model):
    """What a challenger must do to win, and how sure that must be."""

    looks: tuple[int, ...] = Field((20, 40, 80, 160), description="pairs at which a verdict may be given")
    error: float = Field(0.05, gt=0, lt=1, description="chance that any look tells apart what is the same")
    decides: Times = "e2e_ms"
    floor: float = Field(
        0.02,
        ge=0,
        description="least change that counts: two processes of one bundle may differ so",
    )
    prefer: Literal["champion", "challenger"] = Field("champion", description="if neither is faster")
    errors: int = Field(2, ge=0, description="answers that the challenger may lose")
    slo_ttft_ms: float | None = Field(None, gt=0, description="p95 of the challenger's clients")
    slo_e2e_ms: float | None = Field(None, gt=0, description="the same, to the last token")
    slo_error: float = Field(
        0.01, gt=0, lt=1, description="chance that any look finds a promise broken that is kept"
    )
    patience_s: float = Field(
        86_400, gt=0, description="of a trial with a shadow, after which it is given up as not decided"
    )
    quality_error: float = Field(0.01, gt=0, lt=1, description="as `error`, for the first tokens")
    rounding_flips: float = Field(
        0.01, ge=0, description="share of first tokens that two paths of one model may give otherwise"
    )

    @model_validator(mode="after")
    def _looks_are_in_order(self) -> Self:
        if not self.looks or list(self.looks) != sorted(set(self.looks)) or self.looks[0] < LEAST_PAIRS:
            raise ValueError(f"looks must be growing numbers of at least {LEAST_PAIRS} pairs: {self.looks}")
        return self


class Canary(Model):
    """What the challenger's own clients have met."""

    answers: int = 0
    lost: int = Field(0, description="answers that a crash ended")
    not_finite: int = Field(0, description="answers that NaN or infinity ended")
    ttft_ms: tuple[float, ...] = Field((), description="per answer, from its arrival; the first ones")
    e2e_ms: tuple[float, ...] = Field((), description="per answer, from its arrival")


class Samples(Model):
    """All that is known of a challenger in service."""

    pairs: tuple[Pair, ...] = Field((), description="from the shadow, in the order they were run")
    shadowed_s: float = Field(0, ge=0, description="since the shadow began; 0: there is none")
    canary: Canary = Canary()


class QualityTest(Model):
    """How often both gave the same first token, beside what their studies promise."""

    same: int
    pairs: int
    promised: float = Field(description="least share by both quality reports")
    chance: float = Field(description="of so few, if the promise is kept")


class Evidence(Model):
    """What a verdict rests on."""

    look: int | None = Field(None, description="pairs of the last look whose number was reached")
    times: tuple[Comparison, ...] = ()
    quality: QualityTest | None = None
    lost: int = 0
    not_finite: int = 0


class Verdict(Model):
    """What to do with the challenger, and why."""

    kind: VerdictKind
    reason: str
    evidence: Evidence


def judge(
    samples: Samples,
    challenger_quality: QualityReport | None,
    champion_quality: QualityReport | None,
    policy: Policy,
) -> Verdict:
    """The verdict by now. Act on the first that is not ``wait``: times are not looked at again after that.

    Without both quality reports first tokens are not held to anything. The first call imports SciPy, about a
    second: call it in a thread.
    """
    failed = _failures(samples)
    if (reason := _beyond_excuse(samples, failed, policy)) is not None:
        return Verdict(kind="rollback", reason=reason, evidence=failed)
    promised = _promised(challenger_quality, champion_quality, policy)
    quality = _look_at_quality(samples.pairs, promised, policy)
    if quality is not None and quality.chance < policy.quality_error / len(policy.looks):
        evidence = failed.model_copy(update={"quality": quality})
        return Verdict(kind="rollback", reason=_worse_words(quality), evidence=evidence)
    found = _look_at_times(samples.pairs, failed.model_copy(update={"quality": quality}), policy)
    if found.kind == "wait" and samples.shadowed_s >= policy.patience_s:
        return found.model_copy(update={"kind": "rollback", "reason": _undecided_words(samples, found)})
    return found


def _undecided_words(samples: Samples, found: Verdict) -> str:
    beside_others = sum(pair.complete and not pair.quiet for pair in samples.pairs)
    return (
        f"it could not be compared within {samples.shadowed_s / 3600:.3g} hours, keep the incumbent: "
        f"{found.reason}; during {beside_others} others somebody was being answered"
    )


# ── at once ──────────────────────────────────────────────────────────────────────────────────────


def _failures(samples: Samples) -> Evidence:
    """Of clients and of the shadow alike: a crash is one whoever asked."""
    errors = [pair.challenger.error for pair in samples.pairs]
    return Evidence(
        lost=samples.canary.lost + errors.count("engine_lost"),
        not_finite=samples.canary.not_finite + errors.count("not_finite"),
    )


def _beyond_excuse(samples: Samples, failed: Evidence, policy: Policy) -> str | None:
    if failed.not_finite:
        return f"{failed.not_finite} of its answers came to NaN or infinity"
    if failed.lost > policy.errors:
        return f"it lost {failed.lost} answers; {policy.errors} are allowed"
    canary = samples.canary
    limits = (("TTFT", policy.slo_ttft_ms, canary.ttft_ms), ("e2e", policy.slo_e2e_ms, canary.e2e_ms))
    for name, limit_ms, values in limits:
        if limit_ms is not None and (broken := _broken(values, limit_ms, policy)) is not None:
            over, of = broken
            return f"p95 {name} is over its limit of {limit_ms:g} ms: {over} of {of} answers were"
    return None


def _broken(values: Sequence[float], limit_ms: float, policy: Policy) -> tuple[int, int] | None:
    """How many of how many answers were over it, at the first look at which a promise that is kept would
    hardly look so; None if there is none."""
    for look in CLIENT_LOOKS:
        if look > len(values):
            break
        over = sum(value > limit_ms for value in values[:look])
        if chance_of_so_few(look - over, look, 0.95) < policy.slo_error / len(CLIENT_LOOKS):
            return over, look
    return None


# ── quality ──────────────────────────────────────────────────────────────────────────────────────


def _promised(
    challenger: QualityReport | None, champion: QualityReport | None, policy: Policy
) -> float | None:
    """The least share of first tokens that should be the same.

    Both studies say how often the likeliest token after a given text was not the reference's. Where neither
    differs from the reference they agree, so they differ at most as often as both together (union bound).
    First tokens only: the texts after them are no longer the same.
    """
    if challenger is None or champion is None:
        return None
    flips = _most_flips(challenger) + _most_flips(champion) + policy.rounding_flips
    return max(0.0, 1 - flips)


def _most_flips(report: QualityReport) -> float:
    """The share of flips, as many as the report's interval holds."""
    path = report.flipping
    most = path.flips_interval[1]
    return most if most < 1 else path.token_flips


def _look_at_quality(pairs: Sequence[Pair], promised: float | None, policy: Policy) -> QualityTest | None:
    """At the first look that finds too few, or the last that was reached."""
    same = [pair.same_tokens > 0 for pair in pairs if pair.same_tokens is not None]
    found = None
    for look in policy.looks:
        if promised is None or look > len(same):
            break
        count = sum(same[:look])
        chance = chance_of_so_few(count, look, promised)
        found = QualityTest(same=count, pairs=look, promised=promised, chance=chance)
        if chance < policy.quality_error / len(policy.looks):
            break
    return found


def _worse_words(quality: QualityTest) -> str:
    return (
        f"{quality.same} of {quality.pairs} first tokens are the champion's, fewer than the "
        f"{quality.promised:.1%} that both studies promise (chance {quality.chance:.2g})"
    )


# ── times ────────────────────────────────────────────────────────────────────────────────────────


def _look_at_times(pairs: Sequence[Pair], evidence: Evidence, policy: Policy) -> Verdict:
    """Look after look, until one tells them apart."""
    fit = [pair for pair in pairs if pair.quiet and _timed(pair, policy.decides)]
    for look in policy.looks:
        if look > len(fit):
            reason = f"{len(fit)} pairs can be compared; the next look is at {look}"
            return Verdict(kind="wait", reason=reason, evidence=evidence)
        evidence = evidence.model_copy(update={"look": look, "times": _compared(fit[:look], policy)})
        decisive = next(found for found in evidence.times if found.metric == policy.decides)
        if decisive.clear:
            kind: VerdictKind = "promote" if decisive.change < 0 else "rollback"
            return Verdict(kind=kind, reason=_change_words(decisive), evidence=evidence)
    kept = "keep the incumbent" if policy.prefer == "champion" else "take the challenger, which is preferred"
    return Verdict(
        kind="rollback" if policy.prefer == "champion" else "promote",
        reason=f"tie: {kept}; {_change_words(decisive)}",
        evidence=evidence,
    )


def _timed(pair: Pair, metric: Times) -> bool:
    return _time(pair.champion, metric) is not None and _time(pair.challenger, metric) is not None


def _time(side: Side, metric: Times) -> float | None:
    found: float | None = getattr(side, metric)
    return found


def _compared(pairs: Sequence[Pair], policy: Policy) -> tuple[Comparison, ...]:
    """Each of the times, over the pairs that have it; only one decides, the others are shown."""
    confidence = 1 - policy.error / len(policy.looks)
    found = []
    for metric in TIMES:
        timed = [
            (ours, theirs)
            for pair in pairs
            if (ours := _time(pair.challenger, metric)) and (theirs := _time(pair.champion, metric))
        ]
        if len(timed) < LEAST_PAIRS:
            continue
        ours_ms, theirs_ms = zip(*timed, strict=True)
        compared = compare("challenger", "champion", metric, ours_ms, theirs_ms, confidence)
        found.append(compared.model_copy(update={"floor": policy.floor}))
    return tuple(found)


def _change_words(found: Comparison) -> str:
    low, high = found.interval
    return (
        f"{found.metric} changes by {found.change:+.1%} ({found.confidence:.2%} interval {low:+.1%} to "
        f"{high:+.1%}, {found.pairs} pairs; less than {found.floor:.0%} counts as none)"
    )
