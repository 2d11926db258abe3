"""The rows and sentences of evidence: what each says, and what is left out rather than guessed."""

from __future__ import annotations

import pytest
from studies import BASELINE, CHAMPION, RACED, RIVAL, demo_study, planned_study

from open_autoglm import evidence
from open_autoglm.measure.statistics import summarise
from open_autoglm.roofline import bound
from open_autoglm.schemas import OptimizeSpec, Study, Trial
from open_autoglm.units import LengthMix


def champion(study: Study) -> Trial:
    return study.trial(CHAMPION)


def test_without_a_twin_the_noise_floor_is_not_known() -> None:
    """No figure is made up for a host on which no candidate ran twice."""
    assert "is not known" in evidence.noise_words(planned_study())


def test_a_comparison_is_slower_faster_or_not_told_apart() -> None:
    """An interval that holds zero is no difference, whatever the change."""
    apart, tied = (
        next(c for c in demo_study().comparisons if c.candidate == name) for name in (BASELINE, RIVAL)
    )
    assert evidence.change_words(apart) == "120.6 % slower"
    assert evidence.change_words(tied) == "not told apart"
    faster = apart.model_copy(update={"change": -0.1, "interval": (-0.12, -0.08)})
    assert evidence.change_words(faster) == "10.0 % faster"


def test_heats_show_who_ran_until_when() -> None:
    """Who fell comes last with the heats it ran, and a twin is told from a contestant."""
    race, final = demo_study().races
    shorter = race.model_copy(update={"heats": (*race.heats, (CHAMPION, RIVAL))})
    last = evidence.strips(shorter)[-1]
    assert (last.name, last.heats, last.of) == (RACED, 4, 5)
    assert last.fall is not None
    assert [strip.name for strip in evidence.strips(final) if strip.twin] == [CHAMPION]
    assert evidence.race_words(final).startswith("4 entered, 10 heats in 105 s")


def test_percentiles_are_marked_until_they_may_decide() -> None:
    """Of a hundred samples p90 and p95 may decide, and p99 may not."""
    metric = summarise([float(n) for n in range(1, 101)], "ms")
    assert evidence.percentile_words(metric, "p95") == "95.0 ms"
    assert evidence.percentile_words(metric, "p99") == "99.0 ms (indicative)"


def test_a_phase_is_held_to_the_bound_at_its_own_bits() -> None:
    """Nine bits per weight, scales included, are more to read than eight."""
    study = demo_study()
    _, decode = evidence.phase_shares(study, champion(study))
    assert decode.bound == bound(
        study.analysis.profile, study.analysis.hardware, study.spec, "decode", "int8", 9
    )
    assert decode.share == pytest.approx(decode.bound.bound_ms / champion(study).metrics["tpot_ms"].median)
    assert decode.sentence() == "decode reaches 46 % of the bandwidth bound"


def test_no_share_of_a_bound_is_given_where_the_bound_is_of_something_else() -> None:
    """A queue is no prefill, a mix has no one length, and a GPU has other peaks."""
    study = demo_study()

    def phases(spec: OptimizeSpec, trial: Trial) -> list[str]:
        return [s.bound.phase for s in evidence.phase_shares(study.model_copy(update={"spec": spec}), trial)]

    assert phases(study.spec, champion(study)) == ["prefill", "decode"]
    served = study.spec.model_copy(update={"scenario": "server", "request_rate_per_s": 1.0})
    assert phases(served, champion(study)) == ["decode"]
    mixed = study.spec.model_copy(update={"length_mix": LengthMix("512/64,128/32")})
    assert phases(mixed, champion(study)) == []
    on_gpu = champion(study).candidate.model_copy(update={"device": "gpu"})
    assert phases(study.spec, champion(study).model_copy(update={"candidate": on_gpu})) == []


def test_rounds_that_were_run_again_are_counted_apart() -> None:
    """The baseline ran twelve rounds for ten, and two of the ten are disturbed all the same."""
    rows = {row.trial.id: row for row in evidence.rounds_behind(demo_study())}
    assert rows[BASELINE][1:] == ("final", 10, 2, 2, 4, True)
    assert rows[RACED].stage == "race"
    assert "torch-fp32" not in rows


def test_what_was_reused_is_listed_by_stage() -> None:
    """Each stage names who brought its result along."""
    study = demo_study()
    trials = (study.trials[0].model_copy(update={"reused": ("export", "final")}), *study.trials[1:])
    told = evidence.reuse_words(study.model_copy(update={"trials": trials}))
    assert told == [f"export: 1 of 12 ({CHAMPION})", f"final: 1 of 12 ({CHAMPION})"]
    assert evidence.reuse_words(study) == []
