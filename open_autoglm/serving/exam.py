"""What a newcomer must pass before it may answer anybody.

First what can be read from its files, before it takes any memory (:mod:`open_autoglm.serving.compatibility`);
then, in its engine's process but before the first client, whether it still says what it said in its study
and is not far slower than what it is to replace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from open_autoglm.bundle import evidence_of
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.statistics import median_interval
from open_autoglm.monitoring.golden import golden_prompts, golden_shape, study_times
from open_autoglm.schemas import BundleEvidence, Comparison, GoldenPrompt, Manifest, Model, RequestShape
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.replay import Replay, replay
from open_autoglm.serving.service import Service
from open_autoglm.units import quantity

CheckName = Literal[
    "tokenizer", "end_tokens", "context", "chat_template", "memory", "golden_prompts", "latency"
]

NEAR_TIE_NATS = 0.5
"""A token whose probability is within this of the likeliest's may become the likeliest by rounding. Weights
and activations of 8 bits, which are far coarser than another order of summation, left the demo model's own
text at tokens that were behind by 0.32 nats at most."""

_LIKELIEST = 20

SLACK, SLACK_ALONE = 1.5, 3.0
"""How many times as long as what it replaces, or as its own figures say, an answer may take. The second is
wider because those were taken at another time, perhaps with less to do on this host."""

_PROBES = 6
"""The least number of values with a 95 % interval of the median (`median_interval`)."""


class Check(Model):
    """One question and its answer."""

    name: CheckName
    ok: bool
    told: str
    """One sentence, with the figures."""


class Exam(Model):
    """All that was checked of one newcomer."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why not, a sentence each."""
        return tuple(f"{check.name}: {check.told}" for check in self.checks if not check.ok)

    def __add__(self, other: Exam) -> Exam:
        return Exam(checks=(*self.checks, *other.checks))


# ── before it answers ────────────────────────────────────────────────────────────────────────────


async def examine(newcomer: Service, running: Service | None, manifest: Manifest) -> Exam:
    """What ``newcomer`` says and how long it takes, before any client is sent to it.

    ``manifest`` is the newcomer's. ``running`` may be answering clients meanwhile: that makes it slower, and
    is no reason to refuse a newcomer. Whatever befalls the newcomer's engine is a failed check.
    Raises UserError if the manifest's evidence is damaged.
    """
    evidence = evidence_of(manifest)
    golden = await _golden(newcomer, evidence.golden)
    checks = [golden]
    if golden.ok:
        checks.append(await _latency(newcomer, running, evidence))
    return Exam(checks=tuple(checks))


class _Fork(NamedTuple):
    """Where an answer left the reference's."""

    prompt: int
    of: int
    """Tokens of that prompt's answer that it had right in its study."""
    token: int
    nats: float
    """By how much the newcomer finds its own token likelier; infinite if the other is far behind."""


async def _golden(newcomer: Service, golden: Sequence[GoldenPrompt]) -> Check:
    """Whether it still says what it said in its study, as far as that was what the reference says.

    Slots and drafts read other numbers of rows in a call than the study did, and kernels for those round
    differently (`open_autoglm.generation`); that decides between tokens that are nearly equally likely, and
    no others. So at each token the reference's must be the likeliest or within ``NEAR_TIE_NATS`` of it. After
    such a near tie the answer goes on from the reference's token.
    """
    fitting = [one for one in golden if len(one.prompt) + len(one.answer) <= newcomer.max_tokens]
    if not fitting:
        why = "its bundle holds none" if not golden else "they do not fit into a slot"
        return Check(name="golden_prompts", ok=True, told=f"not checked: {why}")
    forks: list[_Fork] = []
    try:
        for number, one in enumerate(fitting, start=1):
            forks += await _forks(newcomer, number, one)
    except EngineLost as error:
        return Check(name="golden_prompts", ok=False, told=f"at golden prompt {number}: {error}")
    known = sum(one.same_tokens for one in fitting)
    told = (
        f"{known} tokens of {len(fitting)} golden prompts, {len(forks)} of them otherwise than in its study"
    )
    wrong = next((fork for fork in forks if fork.nats > NEAR_TIE_NATS), None)
    if wrong is not None:
        told = (
            f"token {wrong.token} of golden prompt {wrong.prompt}, of which it had {wrong.of} right in its "
        )
        told += f"study, is another one, and likelier by {wrong.nats:.1f} nats: no rounding does that"
    return Check(name="golden_prompts", ok=wrong is None, told=told)


async def _forks(newcomer: Service, number: int, golden: GoldenPrompt) -> list[_Fork]:
    """Up to the first that is no near tie: what follows that is another text. Raises EngineLost."""
    answer = golden.answer[: golden.same_tokens]
    found: list[_Fork] = []
    at = 0
    while at < len(answer) or at == 0:
        # One token at least: also a candidate that was never right must say something finite.
        prompt, count = (*golden.prompt, *answer[:at]), max(len(answer) - at, 1)
        said = await replay(newcomer, prompt, count, likeliest=_LIKELIEST)
        pairs = enumerate(zip(said.tokens, answer[at:], strict=False))
        differing = (place for place, (ours, right) in pairs if ours != right)
        if (place := next(differing, None)) is None:
            return found
        found.append(_Fork(number, len(answer), at + place + 1, _behind(said, place, answer[at + place])))
        if found[-1].nats > NEAR_TIE_NATS:
            return found
        at += place + 1
    return found


def _behind(said: Replay, place: int, token: int) -> float:
    """By how many nats ``token`` was less likely than what was said."""
    logs = dict(said.likeliest[place])
    return logs[said.tokens[place]] - logs[token] if token in logs else float("inf")


# ── times ────────────────────────────────────────────────────────────────────────────────────────


async def _latency(newcomer: Service, running: Service | None, evidence: BundleEvidence) -> Check:
    """A few requests as in its study, though not longer than some; refused only if too slow beyond doubt."""
    room = min(service.max_tokens for service in (newcomer, running) if service is not None)
    shape = golden_shape(room, evidence.request)
    prompts = golden_prompts(newcomer.tokenizer, shape, _PROBES + 1)
    ours: list[Replay] = []
    theirs: list[Replay] = []
    for number, prompt in enumerate(prompts):
        turns = [(newcomer, ours)] if running is None else [(newcomer, ours), (running, theirs)]
        for service, answers in turns[:: -1 if number % 2 else 1]:
            try:
                answers.append(await replay(service, prompt, shape.output_tokens))
            except EngineLost as error:
                if service is newcomer:
                    return Check(name="latency", ok=False, told=str(error))
                return Check(name="latency", ok=True, told=f"not compared: of what is running, {error}")
    # The first of each compiles, or reads for the first time.
    mine = [answer.e2e_ms for answer in ours[1:]]
    if running is None:
        return await asyncio.to_thread(_against_figures, mine, shape, evidence)
    found = await asyncio.to_thread(
        compare, "newcomer", "running", "e2e_ms", mine, [answer.e2e_ms for answer in theirs[1:]]
    )
    return _against_running(found, shape)


def _against_running(found: Comparison, shape: RequestShape) -> Check:
    low, high = (1 + end for end in found.interval)
    told = (
        f"{1 + found.change:.2f} times as long as what is running (95 % interval {low:.2f} to {high:.2f}, "
        f"{found.pairs} pairs of {shape.prompt_tokens}/{shape.output_tokens} tokens)"
    )
    ok = low <= SLACK
    return Check(name="latency", ok=ok, told=told if ok else f"{told}: more than {SLACK:g} beyond doubt")


def _against_figures(e2e_ms: Sequence[float], shape: RequestShape, evidence: BundleEvidence) -> Check:
    """Alone it is held to its own study, scaled to this shape."""
    study = study_times(evidence, shape)
    low, _ = median_interval(np.array(e2e_ms))
    took = f"{shape.prompt_tokens}/{shape.output_tokens} tokens took {_ms(float(np.median(e2e_ms)))}"
    if study is None:
        return Check(name="latency", ok=True, told=f"not compared: {took}, and its bundle holds no figures")
    (expected_ms,) = study.e2e_ms
    ok = low <= SLACK_ALONE * expected_ms
    told = f"{took}; by its study it would be about {_ms(expected_ms)}"
    return Check(
        name="latency", ok=ok, told=told if ok else f"{told}, and not over {SLACK_ALONE:g} times that"
    )


def _ms(value: float) -> str:
    return quantity(value, "ms")
