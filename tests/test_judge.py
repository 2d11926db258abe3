"""A challenger wins by being faster beyond doubt, loses by any fault, and chance alone decides nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from demo_trials import SHAPES, demo_quality
from pydantic import ValidationError

from open_autoglm.schemas import QualityReport
from open_autoglm.serving.judge import Canary, Policy, Samples, Verdict, judge
from open_autoglm.serving.shadow import Pair, Side

EXACT = demo_quality(SHAPES[0])
"""Of a candidate without flips."""


def side(scale: float) -> Side:
    return Side(ttft_ms=100 * scale, tpot_ms=10 * scale, e2e_ms=730 * scale)


def pair(ratio: float = 1.0, **changes: Any) -> Pair:
    content: dict[str, Any] = {
        "prompt_tokens": 512,
        "output_tokens": 64,
        "champion_first": True,
        "quiet": True,
        "champion": side(1.0),
        "challenger": side(ratio),
        "same_tokens": 64,
    }
    return Pair(**{**content, **changes})


def noisy_pairs(count: int, ratio: float, seed: int, spread: float = 0.05) -> tuple[Pair, ...]:
    """Each side with noise of its own, log-normal, and both with the host's."""
    random = np.random.default_rng(seed)
    host, ours, theirs = np.exp(random.normal(0, spread, (3, count)))
    return tuple(
        pair(champion=side(float(h * b)), challenger=side(float(ratio * h * a)))
        for h, a, b in zip(host, ours, theirs, strict=True)
    )


def verdict(
    pairs: tuple[Pair, ...],
    canary: Canary | None = None,
    quality: QualityReport | None = EXACT,
    shadowed_s: float = 0,
    **policy: Any,
) -> Verdict:
    samples = Samples(pairs=pairs, canary=canary or Canary(), shadowed_s=shadowed_s)
    return judge(samples, quality, quality, Policy(**policy))


def flipping(share: float) -> QualityReport:
    """A report of a candidate with so many flips on both paths, exactly known."""
    path = EXACT.decode.model_copy(update={"top1_agreement": 1 - share, "flips_interval": (share, share)})
    return EXACT.model_copy(update={"prefill": path, "decode": path})


# ── times ────────────────────────────────────────────────────────────────────────────────────────


def test_there_is_no_verdict_before_the_first_look() -> None:
    found = verdict(noisy_pairs(19, 0.5, 1))
    assert (found.kind, found.reason) == ("wait", "19 pairs can be compared; the next look is at 20")
    assert found.evidence.times == ()


@pytest.mark.parametrize(("ratio", "kind"), [(0.9, "promote"), (1.1, "rollback")])
def test_a_tenth_is_found_either_way(ratio: float, kind: str) -> None:
    """In 40 trials of noise as of a busy host, at the last look at the latest, and never the wrong way."""
    found = [verdict(noisy_pairs(160, ratio, seed, spread=0.15)) for seed in range(40)]
    assert {verdict.kind for verdict in found} == {kind}
    assert all("tie" not in verdict.reason for verdict in found)


def test_the_same_is_seldom_told_apart() -> None:
    """200 A/A trials with four looks each: all looks together err no more often than the policy says."""
    found = [verdict(noisy_pairs(160, 1.0, seed), floor=0) for seed in range(200)]
    promoted = sum(verdict.kind == "promote" for verdict in found)
    told_apart = sum("tie" not in verdict.reason for verdict in found)
    assert told_apart <= 10  # 5 %
    assert promoted <= 5


def test_looking_after_every_pair_changes_nothing() -> None:
    """Pairs between two looks are not looked at, so who asks often sees no more than who asks once."""
    pairs = noisy_pairs(160, 0.97, 3)
    asked = [verdict(pairs[:count]) for count in range(161)]
    first = next(found for found in asked if found.kind != "wait")
    last = asked[-1]
    assert (first.kind, first.reason) == (last.kind, last.reason)
    assert first.evidence.times == last.evidence.times
    assert first.evidence.look in (20, 40, 80, 160)
    assert first.evidence.look == first.evidence.times[-1].pairs


def test_a_tie_keeps_the_incumbent() -> None:
    """Unless the challenger is preferred, by its size, say; a change below the floor is none."""
    small = noisy_pairs(160, 0.99, 1, spread=0.001)
    assert verdict(small).kind == "rollback"
    assert "tie: keep the incumbent" in verdict(small).reason
    assert verdict(small, prefer="challenger").kind == "promote"
    assert verdict(small, floor=0.001).kind == "promote"
    assert "tie" not in verdict(small, floor=0.001).reason


def test_the_policy_says_which_time_decides() -> None:
    """All three are shown."""
    ours = Side(ttft_ms=50, tpot_ms=11, e2e_ms=743)
    pairs = (pair(challenger=ours),) * 20
    assert verdict(pairs, decides="ttft_ms").kind == "promote"
    assert verdict(pairs, decides="tpot_ms").kind == "rollback"
    found = verdict(pairs, decides="e2e_ms", looks=(20,))
    assert "tie" in found.reason
    assert [time.metric for time in found.evidence.times] == ["ttft_ms", "tpot_ms", "e2e_ms"]


def test_only_quiet_and_complete_pairs_are_timed() -> None:
    """Beside a client neither had its usual speed, and without an answer there is no time."""
    loud = (pair(3.0, quiet=False),) * 30
    lost = (pair(challenger=Side(error="engine_lost"), same_tokens=None),) * 2
    assert verdict((*loud, *lost, *noisy_pairs(20, 0.8, 1))).kind == "promote"
    assert verdict((*loud, *lost, *noisy_pairs(19, 0.8, 1))).kind == "wait"


def test_who_cannot_be_compared_is_given_up() -> None:
    """After a day, whatever is preferred; what can be decided is decided, however late."""
    day_s = 24 * 3600.0
    never_quiet = (*noisy_pairs(3, 0.5, 1), *(pair(0.5, quiet=False),) * 40)
    assert verdict(never_quiet, shadowed_s=day_s - 1).kind == "wait"
    found = verdict(never_quiet, shadowed_s=day_s, prefer="challenger")
    assert found.kind == "rollback"
    assert found.reason == (
        "it could not be compared within 24 hours, keep the incumbent: 3 pairs can be compared; "
        "the next look is at 20; during 40 others somebody was being answered"
    )
    assert verdict(noisy_pairs(20, 0.5, 1), shadowed_s=2 * day_s).kind == "promote"


def test_answers_of_one_token_have_no_time_per_token() -> None:
    one = Side(ttft_ms=100, e2e_ms=100)
    faster = Side(ttft_ms=80, e2e_ms=80)
    found = verdict((pair(champion=one, challenger=faster, output_tokens=1, same_tokens=1),) * 20)
    assert found.kind == "promote"
    assert [time.metric for time in found.evidence.times] == ["ttft_ms", "e2e_ms"]


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pairs", "canary", "said"),
    [
        ((pair(challenger=Side(error="not_finite"), same_tokens=None),), Canary(), "NaN"),
        ((), Canary(answers=9, not_finite=1), "1 of its answers came to NaN"),
        ((), Canary(answers=9, lost=3), "it lost 3 answers; 2 are allowed"),
        (
            (pair(challenger=Side(error="engine_lost"), same_tokens=None),),
            Canary(answers=9, lost=2),
            "it lost 3 answers",
        ),
        ((), Canary(answers=100, ttft_ms=(10.0,) * 80 + (51.0,) * 20), "p95 TTFT is over its limit of 50 ms"),
        ((), Canary(answers=100, e2e_ms=((900.0,) * 4 + (1e4,)) * 20), "10 of 50 answers were"),
        ((), Canary(answers=25, e2e_ms=(1e4,) * 25), "25 of 25 answers were"),
    ],
)
def test_a_fault_ends_the_trial_at_once(pairs: tuple[Pair, ...], canary: Canary, said: str) -> None:
    """However fast it is."""
    quick = noisy_pairs(40, 0.5, 1)
    found = verdict((*quick, *pairs), canary, slo_ttft_ms=50, slo_e2e_ms=1000)
    assert found.kind == "rollback"
    assert said in found.reason


@pytest.mark.parametrize(
    "canary",
    [
        Canary(answers=50, lost=2),
        Canary(answers=24, ttft_ms=(51.0,) * 24),  # too few
        Canary(answers=200, ttft_ms=(49.0,) * 195 + (51.0,) * 5),  # within it
    ],
)
def test_what_may_be_chance_ends_nothing(canary: Canary) -> None:
    assert verdict((), canary, slo_ttft_ms=50).kind == "wait"


@pytest.mark.parametrize(("share", "least", "most"), [(0.04, 0, 2), (0.1, 95, 100)])
def test_a_promise_that_is_kept_looks_broken_to_hardly_anybody(share: float, least: int, most: int) -> None:
    """5 % may be over it. Asked after every answer, or held to the share that was seen, most of those who
    keep it with 4 % would be rolled back."""
    random = np.random.default_rng(7)
    broken = 0
    for _ in range(100):
        times = tuple(np.where(random.random(3200) < share, 51.0, 49.0))
        broken += verdict((), Canary(answers=3200, ttft_ms=times), slo_ttft_ms=50).kind == "rollback"
    assert least <= broken <= most


def test_the_champions_own_faults_are_not_the_challengers() -> None:
    lost = pair(champion=Side(error="not_finite"), same_tokens=None)
    assert verdict((lost,) * 5).kind == "wait"


# ── quality ──────────────────────────────────────────────────────────────────────────────────────


def flipped(same: int, count: int) -> tuple[Pair, ...]:
    """The first tokens differ in ``count - same`` pairs, spread over all; not quiet, so without times."""
    step = math.ceil(count / max(count - same, 1))
    found = [pair(quiet=False, same_tokens=0 if n % step == 0 else 5) for n in range(count)]
    return tuple(found)


def test_more_flips_than_promised_are_a_reason() -> None:
    """Both studies together promise 96 % less 1 % for rounding; four in five is fewer beyond doubt."""
    found = verdict(flipped(32, 40), quality=flipping(0.02))
    assert found.kind == "rollback"
    assert found.evidence.quality is not None
    assert found.evidence.quality.promised == pytest.approx(0.95)
    assert "fewer than the 95.0% that both studies promise" in found.reason


def test_flips_as_promised_are_none() -> None:
    """The same differences, of candidates that were chosen with a tenth of flips each."""
    found = verdict(flipped(32, 40), quality=flipping(0.1))
    assert found.kind == "wait"
    assert found.evidence.quality is not None
    assert (found.evidence.quality.same, found.evidence.quality.pairs) == (32, 40)


def test_what_a_study_is_not_sure_of_counts_for_the_challenger() -> None:
    """Flips as many as the interval holds; without an interval those that were seen."""
    wide = flipping(0.02)
    path = wide.decode.model_copy(update={"flips_interval": (0.0, 0.12)})
    wide = wide.model_copy(update={"prefill": path, "decode": path})
    assert verdict(flipped(32, 40), quality=wide).kind == "wait"
    path = wide.decode.model_copy(update={"flips_interval": (0.0, 1.0)})
    unknown = wide.model_copy(update={"prefill": path, "decode": path})
    assert verdict(flipped(32, 40), quality=unknown).kind == "rollback"


def test_kept_promises_are_seldom_called_broken() -> None:
    """Of 300 challengers that flip exactly as often as promised, at most 1 % by all four looks together."""
    random = np.random.default_rng(5)
    blamed = 0
    for _ in range(300):
        same = random.random(160) < 0.95
        pairs = tuple(pair(quiet=False, same_tokens=int(s)) for s in same)
        blamed += verdict(pairs, quality=flipping(0.02)).kind == "rollback"
    assert blamed <= 3


def test_without_reports_nothing_is_promised() -> None:
    """A bundle of another tool was judged by nobody."""
    found = verdict(flipped(0, 40), quality=None)
    assert (found.kind, found.evidence.quality) == ("wait", None)


# ── policy ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("looks", [(), (2, 20), (20, 20), (40, 20)])
def test_looks_that_are_none_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="growing numbers"):
        Policy(looks=looks)


def test_a_verdict_can_be_kept() -> None:
    """With its evidence, as JSON, for the audit."""
    found = verdict(noisy_pairs(40, 0.8, 1))
    assert Verdict.model_validate_json(found.model_dump_json()) == found
