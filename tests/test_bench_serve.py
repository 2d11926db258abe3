"""The benchmark of servers: load generator, rounds of a real endpoint, ratios and targets, soak."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.plots import serve_plot
from benchmarks.serve import Measured, measure, order, places_of
from benchmarks.serve_field import Arm, Prompts, Sizes
from benchmarks.serve_gguf import add_words
from benchmarks.serve_load import LOST, Answer, Load, LoadJob, run
from benchmarks.serve_servers import ours
from benchmarks.serve_table import Round, Row, judge_targets, markdown, ratio, verdict
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.export.gguf_writer import write_gguf

SIZES = Sizes(prompt_tokens=16, output_tokens=4, heats=3, streams=(1, 2), pairs=6)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


# ── the load generator ───────────────────────────────────────────────────────────────────────────

STREAMED = (
    'data: {"choices": [{"text": "a"}]}\n\n',
    'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n',
)


class Scripted:
    """A server that answers each request by the next of ``answers``, and closes without a word if told to."""

    def __init__(self, *answers: str | tuple[str, ...], close: bool = False) -> None:
        self._answers, self._close = list(answers), close
        self.asked: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self._answers:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            self.asked.append((await reader.readexactly(length)).decode())
            answer = self._answers.pop(0)
            if isinstance(answer, str):
                writer.write(answer.encode())
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for part in answer:
                    writer.write(f"{len(part):x}\r\n{part}\r\n".encode())
                    await writer.drain()
                    await asyncio.sleep(0.02)
                writer.write(b"0\r\n\r\n")
            await writer.drain()
            if self._close:
                break
        writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.close()


@pytest.fixture
def scripted() -> Iterator[type[Scripted]]:
    made: list[Scripted] = []

    class Noted(Scripted):
        def __init__(self, *answers: str | tuple[str, ...], close: bool = False) -> None:
            super().__init__(*answers, close=close)
            made.append(self)

    yield Noted
    for server in made:
        server.stop()


def refusal(status: int) -> str:
    body = json.dumps({"error": {"message": "no"}})
    return f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\n\r\n{body}"


def test_times_and_tokens_are_the_clients(scripted: type[Scripted]) -> None:
    """In the order of the requests; a refusal is an answer too."""
    server = scripted(STREAMED, refusal(429), STREAMED)
    found = run(LoadJob(port=server.port, bodies=("1", "2", "3")))
    assert server.asked == ["1", "2", "3"]
    assert [answer.status for answer in found.answers] == [200, 429, 200]
    first, refused, _ = found.answers
    assert (first.prompt_tokens, first.output_tokens) == (3, 2)
    assert 0 < first.ttft_ms < first.ttft_ms + 10 < first.e2e_ms <= found.wall_ms
    assert first.tpot_ms == pytest.approx(first.e2e_ms - first.ttft_ms)
    assert "no" in refused.error


def test_a_connection_that_was_closed_without_a_word_is_opened_again(scripted: type[Scripted]) -> None:
    """As llama.cpp's server does behind a stream: the next request is not lost."""
    server = scripted(*(STREAMED,) * 5, close=True)
    found = run(LoadJob(port=server.port, bodies=tuple("12345"), streams=2))
    assert [answer.status for answer in found.answers] == [200] * 5


def test_nobody_there_is_an_answer(scripted: type[Scripted]) -> None:
    server = scripted(STREAMED)
    run(LoadJob(port=server.port, bodies=("1",)))
    found = run(LoadJob(port=server.port, bodies=("2",)))
    assert found.answers[0].status == LOST
    assert found.answers[0].error


def test_arrivals_do_not_wait_for_answers(scripted: type[Scripted]) -> None:
    server = scripted(*(STREAMED,) * 4)
    found = run(LoadJob(port=server.port, bodies=tuple("1234"), arrivals_s=(0, 0.005, 0.01, 0.015)))
    assert max(answer.begin_ms for answer in found.answers) < min(a.e2e_ms for a in found.answers)


# ── ratios and targets ───────────────────────────────────────────────────────────────────────────


def row(arm: str, streams: int, token_ms: float, cpu_s: float = 1, megabytes: int = 100) -> Row:
    """Heats on a host that gets slower, with a little noise."""
    noise = np.random.default_rng(streams).normal(1, 0.003, 4)
    rounds = [
        Round(heat=heat, load=load(streams, token_ms * (1 + heat) * shake), cpu_s=cpu_s, pss_bytes=megabytes)
        for heat, shake in enumerate(noise.tolist())
    ]
    return Row(arm=arm, label=arm, streams=streams, rounds=tuple(rounds))


def load(streams: int, token_ms: float) -> Load:
    answer = Answer(status=200, begin_ms=0, ttft_ms=token_ms, e2e_ms=10 * token_ms, output_tokens=10)
    return Load(answers=(answer,) * streams, wall_ms=10 * token_ms, client_cpu_ms=1)


ROWS = [
    row("ours", 1, 8),
    row("ours", 8, 16, cpu_s=2, megabytes=300),
    row("llama", 1, 8),
    row("llama", 8, 24),
    row("torch", 8, 48, cpu_s=4, megabytes=1000),
    Row(arm="absent", label="absent", streams=8, reason="not installed"),
]


def test_ratios_are_taken_heat_by_heat() -> None:
    """So a host that slows everybody down changes nothing."""
    found = ratio(ROWS[1], ROWS[0], "tokens_per_s")
    assert found.value == pytest.approx(4, rel=0.05)
    assert 3.8 < found.interval[0] < found.interval[1] < 4.2
    assert found.heats == 4


def test_targets_are_met_missed_or_open() -> None:
    targets = {
        (t.name, t.found and t.found.of): t
        for t in judge_targets(ROWS, [1.0] * 20, "ours", "llama", ["torch"])
    }
    said = {name: target.verdict for name, target in targets.items()}
    assert said["added to the first token by the endpoint", None] == "met"
    assert said["streams scale", "ours at 8"] == "met"
    assert said["llama.cpp's server, 1 streams", "ours at 1"] == "missed"
    assert said["llama.cpp's server, 8 streams", "ours at 8"] == "met"
    assert said["hand-tuned torch, latency_ms", "ours at 8"] == "met"
    assert said["hand-tuned torch, latency_ms", None] == "no figures"  # torch did not run one stream
    assert verdict(2, (1, 3), at_most=True) == "cannot tell"
    assert verdict(2, (1, 3), at_most=False) == "cannot tell"


def test_the_page_has_a_line_for_everybody() -> None:
    targets = judge_targets(ROWS, [], "ours", "llama", ["torch"])
    page = markdown(ROWS, targets)
    assert "absent (not installed)" in page
    assert len({line.count("|") for line in page.split("\n\n")[0].splitlines()}) == 1
    assert "no figures" in page
    assert serve_plot(ROWS, "svg").startswith(b"<?xml")


def test_every_place_has_its_turn_in_every_heat() -> None:
    assert [sorted(order(7, heat)) for heat in range(4)] == [list(range(7))] * 4
    assert len({tuple(order(7, heat)) for heat in range(4)}) == 4


# ── real servers ─────────────────────────────────────────────────────────────────────────────────


def test_prompts_differ_and_are_enough(tiny_glm: Path) -> None:
    prompts = Prompts(load_checkpoint(str(tiny_glm)), SIZES)
    taken = prompts.take(SIZES.prompts - 3)
    assert len({tuple(prompt) for prompt in taken.tolist()}) == len(taken)
    shared = prompts.take(2, "shared")
    assert (shared[0, :12] == shared[1, :12]).all()
    assert (shared[0] != shared[1]).any()


def test_a_real_endpoint_is_measured(bundle: Path, tiny_glm: Path, tmp_path: Path) -> None:
    """Beside the bare engine, and beside one that is not there."""
    arms = [
        Arm("endpoint", "ours", (1, 2), ours(bundle, SIZES.slots, SIZES.room), shared=True),
        Arm("bare", "bare", (1,), bare=bundle),
        Arm("broken", "broken", (1,), ours(tmp_path / "nothing", 1, 64)),
        Arm("absent", "absent", (1,), reason="not installed"),
    ]
    prompts = Prompts(load_checkpoint(str(tiny_glm)), SIZES)
    found = measure(arms, prompts, SIZES, tmp_path)
    assert isinstance(found, Measured)
    assert [(row.arm, row.streams, row.kind) for row in found.rows] == [
        (place.arm.name, place.streams, place.kind) for place in places_of(arms, SIZES)
    ]
    rows = {(row.arm, row.streams, row.kind): row for row in found.rows}
    assert rows["absent", 1, "unique"].reason == "not installed"
    assert "neither a bundle" in rows["broken", 1, "unique"].reason
    for place in (("endpoint", 2, "shared"), ("endpoint", 1, "unique"), ("bare", 1, "unique")):
        assert len(rows[place].rounds) == SIZES.heats
        for round_ in rows[place].rounds:
            assert [a.output_tokens for a in round_.load.answers] == [4] * len(round_.load.answers)
            assert round_.pss_bytes > 10 << 20
    assert len(found.added_ms) == SIZES.pairs - 2  # the first one of each of two blocks is not counted
    assert rows["endpoint", 1, "unique"].rounds[0].load.answers[0].prompt_tokens == 16


def test_more_than_can_be_answered_is_shed(bundle: Path, tmp_path: Path) -> None:
    """Every request gets an answer, a 429 or a 503; the engine lives, and memory stays as it was."""
    found = soak.soak(bundle, tmp_path, requests=600)
    assert sum(found.statuses.values()) == found.requests == 600
    assert found.statuses.keys() <= soak.ALLOWED
    assert found.errors == ()
    assert found.restarts == 0
    assert found.growth < 0.03  # so few requests do not tell more
    assert len(found.memory_bytes[0]) == 2


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────


def test_a_gguf_gets_its_words_and_keeps_its_weights(tiny_glm: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(load_checkpoint(str(tiny_glm)), tmp_path / "plain.gguf")
    add_words(tmp_path / "plain.gguf", tiny_glm / "tokenizer.json", tmp_path / "words.gguf")
    plain, words = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("plain", "words"))
    for before, after in zip(plain.tensors, words.tensors, strict=True):
        assert (before.name, before.tensor_type) == (after.name, after.tensor_type)
        assert (before.data == after.data).all()
    vocabulary = json.loads((tiny_glm / "tokenizer.json").read_text())["model"]["vocab"]
    found = words.fields["tokenizer.ggml.tokens"].contents()
    assert {found[index] for index in vocabulary.values()} >= vocabulary.keys() - {"<|pad|>"}
    same = {
        name for name in plain.fields if not name.startswith(("GGUF", "tokenizer")) and "vocab" not in name
    }
    assert {name: plain.fields[name].contents() for name in same} == {
        name: words.fields[name].contents() for name in same
    }
