"""Our endpoint beside the bare engine and other people's servers: ``python -m benchmarks.serve MODEL``.

Each server is started once, as its documentation shows, and asked over HTTP by one load generator in a
process of its own; while one is asked, the others are stopped (SIGSTOP). In a heat every row has its turn, in
an order that changes; rows with as many streams get the same prompts, and no prompt comes twice or begins
like another, so that no cache helps. ``shared`` prompts have three quarters in common: what reuse brings is
the difference to ``--no-reuse-prefixes``. Answers have one length, whatever ends a text.

What the endpoint adds to a first token is taken apart: each prompt by the bare engine and by the endpoint,
in turns of a few. Who cannot be started or answers wrongly is a row with its reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks.laboratory import save
from benchmarks.plots import serve_plot
from benchmarks.serve_arms import (
    BARE,
    ENDPOINT,
    HAND_TUNED,
    LLAMA,
    bundle_of,
    find_study,
    other_arms,
    our_arms,
    versions,
)
from benchmarks.serve_field import Arm, Entrants, Prompts, Sizes, tell
from benchmarks.serve_table import Kind, Round, Row, judge_targets, markdown, serve_table, targets_table
from open_autoglm.engines.contract import Tokens
from open_autoglm.files import write_atomic
from open_autoglm.schemas import Checkpoint, Study
from open_autoglm.settings import Settings

RESULTS = Path(__file__).parent / "results"
_PAIR_TOKENS = 8
"""Of the answers by which the endpoint and the bare engine are compared: the first one counts."""
_BLOCK = 5
"""Prompts that one of the two is asked in a row."""

QUICK = Sizes(prompt_tokens=16, output_tokens=4, heats=3, streams=(1, 2), pairs=6)


class Place(NamedTuple):
    """A row in a table to be."""

    arm: Arm
    streams: int
    kind: Kind


class Measured(NamedTuple):
    """What the rows and targets are made of."""

    rows: list[Row]
    added_ms: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.serve", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--study", type=Path, help="default: the model's newest with a champion")
    parser.add_argument("--candidate", help="a trial of the study to serve instead of its champion")
    parser.add_argument("--llama-server", type=Path, help="default: what `make llama-server` built")
    parser.add_argument("--prompt-tokens", type=int, default=Sizes().prompt_tokens)
    parser.add_argument("--output-tokens", type=int, default=Sizes().output_tokens)
    parser.add_argument("--heats", type=int, default=Sizes().heats)
    parser.add_argument("--quick", action="store_true", help="sizes at which nothing can be told")
    parser.add_argument("--json", type=Path, default=RESULTS / "serve.json")
    asked = parser.parse_args()
    settings = Settings()
    study = find_study(settings, asked.model, asked.study)
    sizes = QUICK if asked.quick else Sizes(asked.prompt_tokens, asked.output_tokens, asked.heats)
    candidate = asked.candidate or study.champion
    if candidate is None:
        raise SystemExit("the study has no champion: name --candidate")
    binary = asked.llama_server or settings.home / "peers" / "llama-server"
    prompts = Prompts(study.checkpoint, sizes, study.spec.seed)
    with tempfile.TemporaryDirectory(prefix="serve-", dir=settings.home) as folder:  # bundles are linked
        work = Path(folder)
        arms = our_arms(bundle_of(study, candidate, work), candidate, sizes)
        arms += other_arms(study, prompts, sizes, binary, settings.home, work)
        found = measure(arms, prompts, sizes, work)
    report(found, about(study, candidate, sizes, arms), asked.json)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(arms: Sequence[Arm], prompts: Prompts, sizes: Sizes, work: Path) -> Measured:
    """Everybody's rounds, and what the endpoint adds."""
    with Entrants(arms, prompts, sizes, work) as entrants:
        added_ms = added(entrants, prompts.take(sizes.pairs))
        places = places_of(arms, sizes)
        rounds: list[list[Round]] = [[] for _ in places]
        for heat in range(sizes.heats):
            asked = prompts_of_heat(prompts, places, sizes)
            for number in order(len(places), heat):
                arm, streams, kind = places[number]
                if arm.name in entrants:
                    found = entrants.round(arm.name, heat, asked[streams, kind], streams)
                    rounds[number] += [found] if found else []
            tell(f"heat {heat + 1} of {sizes.heats}")
        rows = [
            _row(place, found, entrants.reasons.get(place.arm.name, ""))
            for place, found in zip(places, rounds, strict=True)
        ]
    return Measured(rows, added_ms)


def places_of(arms: Sequence[Arm], sizes: Sizes) -> list[Place]:
    """Every arm at each of its numbers of streams; then those with shared prompts."""
    unique = [Place(arm, streams, "unique") for arm in arms for streams in arm.streams]
    return unique + [Place(arm, sizes.slots, "shared") for arm in arms if arm.shared]


def prompts_of_heat(
    prompts: Prompts, places: Sequence[Place], sizes: Sizes
) -> dict[tuple[int, Kind], Tokens]:
    """New ones, the same for all rows with as many streams."""
    wanted = dict.fromkeys((place.streams, place.kind) for place in places)
    return {(streams, kind): prompts.take(sizes.requests(streams), kind) for streams, kind in wanted}


def order(places: int, heat: int) -> list[int]:
    """Each heat begins elsewhere, and every other one runs backwards."""
    start = heat * places // 3 % places
    turned = [(start + turn) % places for turn in range(places)]
    return turned[::-1] if heat % 2 else turned


def added(entrants: Entrants, prompts: Tokens) -> list[float]:
    """For each prompt the endpoint's TTFT less the bare engine's, in milliseconds; [] if one is missing.

    Each is asked a few prompts in a row, and the first of them, which wakes a process that was stopped, is
    left out. Raises WrongAnswer.
    """
    if BARE not in entrants or ENDPOINT not in entrants:
        return []
    found: list[float] = []
    for number in range(0, len(prompts), _BLOCK):
        block = prompts[number : number + _BLOCK]
        names = (BARE, ENDPOINT) if number // _BLOCK % 2 else (ENDPOINT, BARE)
        loads = {name: entrants.ask(name, block, 1, _PAIR_TOKENS) for name in names}
        pairs = zip(loads[ENDPOINT].answers, loads[BARE].answers, strict=True)
        found += [ours.ttft_ms - bare.ttft_ms for ours, bare in list(pairs)[1:]]
    return found


def _row(place: Place, rounds: Sequence[Round], reason: str) -> Row:
    return Row(
        arm=place.arm.name,
        label=place.arm.label,
        streams=place.streams,
        kind=place.kind,
        reason=reason,
        rounds=tuple(rounds),
    )


# ── telling ──────────────────────────────────────────────────────────────────────────────────────


def about(study: Study, candidate: str, sizes: Sizes, arms: Sequence[Arm]) -> dict[str, object]:
    """What the figures depend on."""
    checkpoint: Checkpoint = study.checkpoint
    return {
        "checkpoint": checkpoint.model_dump(mode="json", include={"name", "digest"}),
        "study": study.id,
        "candidate": candidate,
        "sizes": sizes._asdict(),
        "versions": versions(arms),
    }


def report(found: Measured, described: dict[str, object], path: Path) -> None:
    """Tables on the terminal; beside ``path``, which gets the samples, a page and a plot."""
    targets = judge_targets(found.rows, found.added_ms, ENDPOINT, LLAMA, HAND_TUNED)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)
    console.print(serve_table(found.rows))
    console.print(targets_table(targets))
    content = {
        **described,
        "rows": [row.model_dump(mode="json") for row in found.rows],
        "added_ms": found.added_ms,
        "targets": [target.model_dump(mode="json") for target in targets],
    }
    save(path, content)
    write_atomic(path.with_suffix(".md"), markdown(found.rows, targets))
    for form in ("png", "svg"):
        write_atomic(path.with_suffix(f".{form}"), serve_plot(found.rows, form))


if __name__ == "__main__":
    main()
