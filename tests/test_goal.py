"""A whole request in one line: what it means, and the one sentence for what it cannot mean."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from open_autoglm.cli.commands import make_spec
from open_autoglm.cli.goal import EXAMPLE, parse_goal
from open_autoglm.cli.main import OBJECTIVES, SCENARIOS
from open_autoglm.errors import UserError
from open_autoglm.schemas import Objective, Scenario
from open_autoglm.units import ByteSize, Duration


def spec_of(goal: str, **arguments: Any) -> Any:
    return make_spec({"model_path": "here", "input_shape": "1,32", "goal": goal, **arguments})


@pytest.mark.parametrize(
    ("goal", "fields"),
    [
        ("minimise latency", {"objective": "latency"}),
        ("minimize e2e", {"objective": "latency"}),
        ("minimise e2e_p95", {"objective": "e2e_p95"}),
        ("minimise ttft", {"objective": "ttft"}),
        ("Minimise TTFT_P95", {"objective": "ttft_p95"}),
        ("minimise tpot", {"objective": "tpot"}),
        ("minimise rss", {"objective": "memory"}),
        ("minimise memory", {"objective": "memory"}),
        ("maximise throughput", {"objective": "throughput"}),
        ("  maximize   goodput  ", {"objective": "goodput"}),
        (
            "minimise ttft_p95 subject to quality >= 0.99, rss <= 1GiB",
            {"objective": "ttft_p95", "min_quality": "0.99", "max_memory": "1GiB"},
        ),
        ("minimise tpot subject to ttft<=50ms", {"objective": "tpot", "max_latency": "50ms"}),
        ("minimise tpot subject to ttft_p95 ≤ 50ms", {"objective": "tpot", "max_latency": "50ms"}),
        ("minimise memory SUBJECT TO latency <= 2s,", {"objective": "memory", "max_latency": "2s"}),
        ("maximise throughput subject to tpot <= 20ms", {"objective": "throughput", "max_tpot": "20ms"}),
        ("minimise e2e subject to memory <= 2GiB", {"objective": "latency", "max_memory": "2GiB"}),
        ("minimise e2e subject to quality ≥ 99%", {"objective": "latency", "min_quality": 0.99}),
        ("minimise e2e subject to flips <= 5%", {"objective": "latency", "max_token_flips": "5%"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_goal_sets_objective_and_limits(goal: str, fields: dict[str, Any]) -> None:
    """Either spelling, either sign, in any case; what it does not name stays as it was."""
    assert parse_goal(goal) == fields


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        ("", "'' is not a goal; write it like: minimise ttft_p95 subject to"),
        ("fast please", "'fast please' is not a goal"),
        ("minimise", "'minimise' is not a goal"),
        ("minimise ttft where rss <= 1GiB", "is not a goal"),
        ("minimise ttft subject to", "is not a goal"),
        ("minimise goodput", "cannot minimise 'goodput'; it can minimise latency, "),
        ("maximise ttft", "cannot maximise 'ttft'; it can maximise throughput, goodput"),
        ("minimise ttft subject to rss", "'rss' is not a limit; write name <= value with one of ttft, "),
        ("minimise ttft subject to rss < 1GiB", "'rss < 1GiB' is not a limit"),
        ("minimise ttft subject to size <= 1GiB", "'size <= 1GiB' is not a limit"),
        ("minimise ttft subject to rss <= 1 GiB", "'rss <= 1 GiB' is not a limit"),
        ("minimise ttft subject to rss >= 1GiB", "is the wrong way round; rss takes <="),
        ("minimise ttft subject to quality <= 0.9", "is the wrong way round; quality takes >="),
        ("minimise e2e subject to rss <= 1GiB, memory <= 2GiB", "'memory <= 2GiB' limits what is limited"),
        ("minimise e2e subject to ttft <= 1s, latency <= 2s", "give each limit once"),
    ],
    ids=lambda value: value or "nothing",
)
def test_what_is_no_goal_is_refused_in_one_sentence(goal: str, sentence: str) -> None:
    """It quotes the part that is not understood and says what could stand there."""
    with pytest.raises(UserError) as caught:
        parse_goal(goal)
    told = str(caught.value)
    assert told.startswith("--goal: ")
    assert sentence in told
    assert "\n" not in told


def test_a_goal_becomes_a_spec_with_units() -> None:
    """As if each had been said by its own flag."""
    spec = spec_of("minimise tpot subject to ttft <= 50ms, rss <= 1GiB, quality >= 99.5%")
    assert spec.objective == "tpot"
    assert spec.max_latency == Duration("50ms")
    assert spec.max_memory == ByteSize("1GiB")
    assert spec.min_quality == pytest.approx(0.995)
    assert spec.max_tpot is None
    assert spec_of("minimise tpot subject to flips <= 2.5%").max_token_flips == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        ("minimise tpot subject to ttft <= 50", "'50' has no unit: write a duration like 50ms"),
        ("minimise tpot subject to rss <= 1ms", "the unit 'ms' of '1ms' is not known"),
        ("minimise tpot subject to quality >= good", "--min-quality: Input should be a valid number"),
        ("minimise tpot subject to quality >= much%", "--min-quality: Input should be a valid number"),
        ("minimise tpot subject to quality >= 0%", "--min-quality: Input should be greater than 0"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(goal: str, sentence: str) -> None:
    """By the same rule and in the same words as its flag."""
    with pytest.raises(UserError, match="--") as caught:
        spec_of(goal)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"objective": "latency"}, "--objective"),
        ({"max_latency": "1s"}, "--max-latency"),
        ({"max_tpot": "1s"}, "--max-tpot"),
        ({"max_memory": "1GiB"}, "--max-memory"),
        ({"min_quality": 0.9}, "--min-quality"),
        ({"max_token_flips": "5%"}, "--max-token-flips"),
    ],
    ids=str,
)
def test_a_goal_and_a_flag_must_not_say_the_same_thing(arguments: dict[str, Any], flag: str) -> None:
    """Two answers to one question: the user decides which."""
    with pytest.raises(UserError, match=f"so does {flag}: give one of them"):
        spec_of("minimise ttft", **arguments)


def test_the_example_is_a_goal() -> None:
    """What the help and every refusal show can be typed as it stands."""
    spec = spec_of(EXAMPLE)
    assert (spec.objective, spec.min_quality, spec.max_memory) == ("ttft_p95", 0.99, ByteSize("1GiB"))


def test_every_objective_can_be_said_as_a_goal() -> None:
    """And the flags offer what the glossary knows, though help does not import it."""
    said = set()
    for verb in ("minimise", "maximise"):
        for name in ("e2e", "e2e_p95", "ttft", "ttft_p95", "tpot", "rss", "throughput", "goodput"):
            try:
                said.add(parse_goal(f"{verb} {name}")["objective"])
            except UserError:
                continue
    assert said == set(get_args(Objective)) == set(OBJECTIVES)
    assert get_args(Scenario) == SCENARIOS
