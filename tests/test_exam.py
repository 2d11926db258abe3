"""A newcomer answers nobody before it has shown that it can take the running server's place."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import altered, golden_prompts, onnxruntime_bundle, openable_study
from endpoints import metric
from services import Loop, counted, engine_options, event_loop, fleet_of, with_nan, with_other_weights
from tiny_models import build_tokenizer

from open_autoglm.bundle import MANIFEST, build_bundle, evidence_of, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import BundleEvidence, Manifest
from open_autoglm.serving import compatibility as files
from open_autoglm.serving import exam
from open_autoglm.serving.api import create_app
from open_autoglm.serving.exam import Check, Exam, examine
from open_autoglm.serving.messages import Generation, Sampling, Token
from open_autoglm.serving.replay import GaveWay, Replay, replay
from open_autoglm.serving.service import Asked, Service

TEXTS = ("The capital of France is", "A model reads a prompt one token at a time and then")
GOLDEN_TOKENS = 16


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with event_loop(tmp_path_factory.mktemp("logs")) as loop:
        yield loop


@pytest.fixture(scope="module")
def bundle(tiny_glm: Path, shared_ledger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    golden = golden_prompts(tiny_glm, [tokenizer(text)["input_ids"] for text in TEXTS], GOLDEN_TOKENS)
    return onnxruntime_bundle(tiny_glm, tmp_path_factory.mktemp("served"), golden, ledger=shared_ledger)


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle)[0]


@pytest.fixture(scope="module")
def running(loop: Loop, bundle: Path) -> Service:
    return loop.serve(bundle)


@pytest.fixture(scope="module")
def newcomer(loop: Loop, bundle: Path) -> Service:
    return loop.serve(bundle)


@pytest.fixture(scope="module")
def broken(loop: Loop, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Says nothing but NaN."""
    return loop.serve(altered(bundle, tmp_path_factory.mktemp("broken") / "bundle", with_nan))


def check(found: Exam, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def with_evidence(manifest: Manifest, **changes: Any) -> Manifest:
    return manifest.model_copy(update={"evidence": {**manifest.evidence, **changes}})


# ── what it says ─────────────────────────────────────────────────────────────────────────────────


def test_the_same_bundle_passes(loop: Loop, newcomer: Service, running: Service, manifest: Manifest) -> None:
    """With the figures in words, and none of it counts as a client's."""
    found = loop.runner.run(examine(newcomer, running, manifest))
    assert found.passed, found.refusals
    assert [check.name for check in found.checks] == ["golden_prompts", "latency"]
    assert "32 tokens of 2 golden prompts, 0 of them otherwise" in check(found, "golden_prompts").told
    assert "6 pairs of 184/16 tokens" in check(found, "latency").told
    assert metric(counted(newcomer), "vllm:e2e_request_latency_seconds_count") == 0
    assert newcomer.begun == 0


def test_another_model_is_refused(loop: Loop, bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Files that are whole, but not of the model that was measured; its times are not even asked for."""
    other = loop.serve(altered(bundle, tmp_path / "bundle", with_other_weights))
    found = loop.runner.run(examine(other, None, manifest))
    assert not found.passed
    assert [check.name for check in found.checks] == ["golden_prompts"]
    assert "of which it had 16 right in its study" in found.refusals[0]


def test_a_near_tie_may_go_either_way(
    loop: Loop, newcomer: Service, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study's token is forgiven for being second by what rounding can do, and not by more; after it
    the answer goes on as if it had been said."""
    golden = evidence_of(manifest).golden[0]
    said = loop.runner.run(replay(newcomer, golden.prompt, 6, likeliest=2))
    (first, best), (second, next_best) = said.likeliest[5]
    assert first == golden.answer[5]
    after = loop.runner.run(replay(newcomer, (*golden.prompt, *golden.answer[:5], second), 3))
    answer = (*golden.answer[:5], second, *after.tokens)
    other = golden.model_copy(update={"answer": answer, "same_tokens": len(answer)})
    monkeypatch.setattr(exam, "NEAR_TIE_NATS", best - next_best + 0.01)
    forgiven = loop.runner.run(exam._golden(newcomer, [other]))
    assert forgiven.ok
    assert "9 tokens of 1 golden prompts, 1 of them otherwise" in forgiven.told
    monkeypatch.setattr(exam, "NEAR_TIE_NATS", best - next_best - 0.01)
    refused = loop.runner.run(exam._golden(newcomer, [other]))
    assert not refused.ok
    assert "token 6 of golden prompt 1" in refused.told


def test_only_what_it_had_right_in_its_study_is_asked_of_it(
    loop: Loop, newcomer: Service, manifest: Manifest
) -> None:
    """A quantised candidate leaves the reference's text at some token, and was chosen knowing that."""
    golden = evidence_of(manifest).golden[0]
    answer = (*golden.answer[:4], *((token + 1) % 100 for token in golden.answer[4:]))
    right = golden.model_copy(update={"answer": answer, "same_tokens": 4})
    assert loop.runner.run(exam._golden(newcomer, [right])).ok
    never = golden.model_copy(update={"answer": answer, "same_tokens": 0})
    assert loop.runner.run(exam._golden(newcomer, [never])).ok
    wrong = golden.model_copy(update={"answer": answer, "same_tokens": 16})
    assert not loop.runner.run(exam._golden(newcomer, [wrong])).ok


@pytest.mark.parametrize("golden", [None, [], [{"prompt": [5] * 190, "answer": [5] * 16, "same_tokens": 1}]])
def test_what_cannot_be_checked_is_said(
    loop: Loop, newcomer: Service, manifest: Manifest, golden: Any
) -> None:
    """An older bundle holds no golden prompts, and a small slot no long ones."""
    without = manifest.model_copy(
        update={"evidence": {k: v for k, v in manifest.evidence.items() if k != "golden"}}
    )
    asked = without if golden is None else with_evidence(manifest, golden=golden)
    found = loop.runner.run(examine(newcomer, None, asked))
    assert found.passed
    assert check(found, "golden_prompts").told.startswith("not checked: ")


@pytest.mark.parametrize("golden", ["none", [1], [{"prompt": [], "answer": [], "same_tokens": 0}]])
def test_damaged_evidence_is_an_error(manifest: Manifest, golden: Any) -> None:
    with pytest.raises(UserError, match=r"evidence of .* is damaged"):
        evidence_of(with_evidence(manifest, golden=golden))


# ── NaN ──────────────────────────────────────────────────────────────────────────────────────────


def test_nan_fails_the_exam(loop: Loop, broken: Service, manifest: Manifest) -> None:
    """Whether there are golden prompts or not."""
    assert "NaN" in loop.runner.run(examine(broken, None, manifest)).refusals[0]
    without = with_evidence(manifest, golden=[])
    assert "latency: the model computed NaN" in loop.runner.run(examine(broken, None, without)).refusals[0]


def test_nan_is_no_answer(loop: Loop, broken: Service) -> None:
    """Clients get an error and not the text of token 0; it is counted, and the engine lives."""
    app = create_app(fleet_of(broken))

    async def ask(**more: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "tiny", "prompt": TEXTS[0], "max_tokens": 4, **more}
            return await client.post("/v1/completions", json=body)

    for more in ({}, {"temperature": 0}, {"stream": True}):
        response = loop.runner.run(ask(**more))
        assert response.status_code == 500, response.text
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("engine_error", "not_finite")
        assert "send the request again" not in error["message"]
    counts = counted(broken)
    assert metric(counts, "autoglm_requests_not_finite_total") == 3
    assert metric(counts, "autoglm_requests_failed_total") == 0
    assert loop.runner.run(ask(n=2)).status_code == 500  # the first to fail ends both
    assert broken.engine.state == "ready"
    assert broken.begun == broken.ended


# ── times ────────────────────────────────────────────────────────────────────────────────────────


def test_a_much_slower_one_is_refused(
    loop: Loop, running: Service, manifest: Manifest, tiny_glm: Path, tmp_path: Path
) -> None:
    """torch takes several times as long as ONNX Runtime for a model as tiny as this; the other way round
    it is no reason to refuse."""
    study = openable_study(tiny_glm)
    slow = loop.serve(build_bundle(study, study.trials[0], tmp_path / "torch").path)
    same_shape = with_evidence(manifest, golden=[])
    found = loop.runner.run(examine(slow, running, same_shape))
    assert "more than 1.5 beyond doubt" in "".join(found.refusals)
    assert loop.runner.run(examine(running, slow, same_shape)).passed


def test_alone_it_is_held_to_its_own_figures(loop: Loop, newcomer: Service, manifest: Manifest) -> None:
    """As its study measured it, scaled to the length of the prompts that fit here."""
    study = {"ttft_ms": {"unit": "ms", "median": 0.01}, "tpot_ms": {"unit": "ms", "median": 0.001}}
    found = loop.runner.run(examine(newcomer, None, with_evidence(manifest, metrics=study)))
    assert "184/16 tokens took" in found.refusals[0]
    assert "over 3 times" in found.refusals[0]
    assert loop.runner.run(examine(newcomer, None, manifest)).passed
    unknown = loop.runner.run(examine(newcomer, None, with_evidence(manifest, metrics={})))
    assert "holds no figures" in check(unknown, "latency").told


def test_a_running_server_that_is_lost_is_no_fault_of_the_newcomer(
    loop: Loop, newcomer: Service, broken: Service, manifest: Manifest
) -> None:
    found = loop.runner.run(examine(newcomer, broken, manifest))
    assert found.passed
    assert check(found, "latency").told.startswith("not compared: ")


# ── a replay ─────────────────────────────────────────────────────────────────────────────────────


def test_a_replay_reads_what_was_just_asked(
    loop: Loop, running: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of a comparison begin from nothing, though one has the client's prompt in its cache."""
    seen: list[int] = []
    generate = running.engine.generate

    async def watched(generation: Generation) -> AsyncGenerator[Token]:
        async for token in generate(generation):
            seen.append(token.cached_tokens)
            yield token

    async def ask_and_replay() -> None:
        prompt = tuple(range(5, 65))
        for _ in range(2):
            async for _piece in running.answer(Asked(prompt, 1, Sampling())):
                pass
        await replay(running, prompt, 1)

    monkeypatch.setattr(running.engine, "generate", watched)
    loop.runner.run(ask_and_replay())
    assert seen == [0, 59, 0]


def test_a_replay_gives_way(loop: Loop, running: Service) -> None:
    """At once, and its slot is free again."""

    async def give_way() -> int:
        for _ in range(3):  # more often than there are slots
            with pytest.raises(GaveWay):
                await replay(running, (5, 6, 7), 150, unless=lambda: True)
        await replay(running, (5, 6, 7), 1)
        return running.engine.load.running

    assert loop.runner.run(give_way()) == 0


def test_what_gave_way_tells_what_it_had(loop: Loop, running: Service) -> None:
    """The tokens before the one at which somebody was found to have come; of one token nothing is left."""

    async def until(most: int) -> Replay | None:
        asked = itertools.count(1)
        with pytest.raises(GaveWay) as given_up:
            await replay(running, (5, 6, 7), 20, unless=lambda: next(asked) >= most)
        return given_up.value.until_then

    whole = loop.runner.run(replay(running, (5, 6, 7), 20))
    found = loop.runner.run(until(4))
    assert found is not None
    assert found.tokens == whole.tokens[:3]
    assert 0 < found.ttft_ms < found.e2e_ms
    assert loop.runner.run(until(1)) is None


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a JSON file of the tokenizer's directory."""

    def edited(bundle: Path) -> None:
        path = bundle / "tokenizer" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=3))

    return edited


def swap_two_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def other_template(bundle: Path) -> None:
    (bundle / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")


DIFFERENT: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "vocabulary": (edit("tokenizer.json", swap_two_tokens), "tokenizer", "model"),
    "normaliser": (
        edit("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})),
        "tokenizer",
        "normalizer",
    ),
    "added token": (
        edit("tokenizer.json", lambda c: c["added_tokens"].pop()),
        "tokenizer",
        "added_tokens",
    ),
    "special token": (
        edit("tokenizer_config.json", lambda c: c.update(eos_token="<|user|>")),
        "tokenizer",
        "special tokens",
    ),
    "end": (
        edit("generation_config.json", lambda c: c.update(eos_token_id=[1, 2])),
        "end_tokens",
        "1, 2, not at 1",
    ),
    "template": (other_template, "chat_template", "another chat template"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_language_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    """One prompt must be the same tokens to both, and end at the same ones; what differs is said."""
    change, named, said = DIFFERENT[name]
    other = altered(bundle, tmp_path / "bundle", change)
    found = files.compatibility(engine_options(other), engine_options(bundle))
    assert [check.name for check in found.checks if not check.ok] == [named]
    assert said in check(found, named).told


def test_how_a_file_is_written_is_no_difference(bundle: Path, tmp_path: Path) -> None:
    """Spaces, the order of keys, and what pads a batch change no id."""
    rewritten = edit("tokenizer.json", lambda c: c.update(padding=None, truncation={"max_length": 9}))
    other = altered(bundle, tmp_path / "bundle", rewritten)
    assert files.compatibility(engine_options(other), engine_options(bundle)).passed


def test_a_wanted_difference_is_accepted(bundle: Path, tmp_path: Path) -> None:
    other = altered(bundle, tmp_path / "bundle", other_template)
    pair = engine_options(other), engine_options(bundle)
    found = files.compatibility(*pair, accept={"chat_template"})
    assert found.passed
    assert check(found, "chat_template").told == "accepted: it has another chat template"


def test_what_was_promised_must_fit(bundle: Path) -> None:
    """Clients may have been told of so many tokens."""
    small, large = engine_options(bundle, max_tokens=100), engine_options(bundle, max_tokens=5000)
    found = files.compatibility(small, large)
    assert found.refusals == ("context: room for 100 tokens; the running server promises 512",)
    assert files.compatibility(large, small).passed


def test_it_must_fit_beside_what_is_running(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "read_memory", lambda: (64 << 30, 100 << 20))
    found = files.compatibility(engine_options(bundle), None)
    assert [check.name for check in found.checks] == ["memory"]
    assert "100 MiB are available" in found.refusals[0]


def test_memory_is_the_studys_peak_and_the_slots_caches(bundle: Path, manifest: Manifest) -> None:
    """A study has one request in its cache, a server as many as it has slots."""
    evidence = evidence_of(manifest)
    assert evidence.request is not None
    assert evidence.kv_bytes_per_token is not None
    peak = int(evidence.metrics["peak_rss_bytes"].median)
    one = evidence.request.prompt_tokens + evidence.request.output_tokens
    long = manifest.model_copy(update={"context_tokens": 8192})
    needed, _ = files.expected_bytes(long, engine_options(bundle, slots=3, max_tokens=2000))
    assert needed == peak + (6000 - one) * evidence.kv_bytes_per_token
    assert files.expected_bytes(long, engine_options(bundle, slots=1, max_tokens=100))[0] == peak
    weights = sum(path.stat().st_size for path in (bundle / "model").iterdir())
    old = manifest.model_copy(update={"evidence": {}})
    assert evidence_of(old) == BundleEvidence()
    assert files.expected_bytes(old, engine_options(bundle))[0] == int(1.5 * weights)


def test_golden_prompts_are_no_part_of_the_digest(bundle: Path, tmp_path: Path) -> None:
    """Another study of the same winner asks other prompts; an older bundle has none and can be read."""
    described = open_bundle(bundle)[1]

    def forget(copy: Path) -> None:
        content = json.loads((copy / MANIFEST).read_text())
        del content["evidence"]["golden"], content["evidence"]["kv_bytes_per_token"]
        (copy / MANIFEST).write_text(json.dumps(content))

    older = altered(bundle, tmp_path / "bundle", forget)
    manifest, found = open_bundle(older)
    assert found.digest == described.digest
    assert evidence_of(manifest).golden == ()
