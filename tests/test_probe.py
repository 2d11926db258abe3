"""The endpoint looks at itself, as an administrator asks it to: a real server and a real engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoints import Endpoint, administration, endpoint, metric
from windows import QUIET, host, window

from open_autoglm.bundle import open_bundle
from open_autoglm.monitoring.cause import name_cause
from open_autoglm.monitoring.golden import golden_shape, study_baseline
from open_autoglm.monitoring.golden_ratios import golden_ratios
from open_autoglm.monitoring.policy import CausePolicy
from open_autoglm.schemas import EndpointProbe, GoldenTimes, RequestShape

NAME = "tiny"


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    with endpoint(tiny_bundle, home, "--name", NAME, "--max-tokens", "200") as server:
        yield server


@pytest.fixture
def admin(served: Endpoint) -> Iterator[httpx.Client]:
    with administration(served) as client:
        yield client


def examine(admin: httpx.Client, seconds: float) -> EndpointProbe:
    response = admin.post("/admin/probe", json={"seconds": seconds})
    assert response.status_code == 200, response.text
    return EndpointProbe.model_validate(response.json())


def times(probe: EndpointProbe) -> GoldenTimes:
    assert probe.golden is not None
    return probe.golden


def test_the_golden_requests_are_timed(admin: httpx.Client, tiny_bundle: Path) -> None:
    """Of the shape of the bundle's study, as far as there is room; no client's figures know of them."""
    found = examine(admin, 2)
    golden = times(found)
    assert found.source == "probe"
    assert found.bundle_digest == open_bundle(tiny_bundle, verify=False)[1].digest[:12]
    assert (golden.prompt_tokens, golden.output_tokens) == (184, 16)
    assert 3 <= len(golden.ttft_ms) == len(golden.tpot_ms) <= 25
    assert len(golden.e2e_ms) == len(golden.tpot_ms)
    assert min(golden.ttft_ms) > 0
    assert golden.busy_share < 0.2
    assert not golden.ended
    assert found.host is not None
    assert 2 <= found.host.seconds < 10
    assert found.host.own_cores > 0
    assert found.settings["onnxruntime"][0].isdigit()
    series = admin.get("/metrics").text
    assert metric(series, "vllm:e2e_request_latency_seconds_count") == 0


def test_a_rehearsal_is_no_secret(admin: httpx.Client) -> None:
    """The cause of a breach says that the engine was made slower, and no more once it is not."""
    assert examine(admin, 0.1).slowed_share == 0
    for share in (0.6, 0.0):
        admin.post("/admin/slow", json={"share": share}).raise_for_status()
        assert examine(admin, 0.1).slowed_share == share


def test_the_answer_comes_when_the_time_is_up(admin: httpx.Client) -> None:
    """Even if that is less than one golden request needs."""
    begin_s = time.monotonic()
    found = examine(admin, 0.1)
    assert time.monotonic() - begin_s < 5
    assert len(times(found).ttft_ms) <= 25


def test_clients_come_first(served: Endpoint, admin: httpx.Client) -> None:
    """While somebody is always answered, it waits, gives way, and fails nobody."""
    stopped = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        body = {"model": NAME, "prompt": "So are", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=served.url, timeout=60) as http:
            while not stopped.is_set():
                statuses.append(http.post("/v1/completions", json=body).status_code)

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(ask) for _ in range(2)]
        try:
            found = times(examine(admin, 1.5))
        finally:
            stopped.set()
        for client in clients:
            client.result()
    assert found.waits + found.gave_way >= 1
    assert found.busy_share > 0.5
    assert statuses
    assert set(statuses) == {200}


def test_one_probe_at_a_time(admin: httpx.Client) -> None:
    """Two would be each other's clients."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(examine, admin, 1.5)
        time.sleep(0.5)
        second = admin.post("/admin/probe", json={"seconds": 1})
        assert second.status_code == 409
        assert "another probe is under way" in second.text
        assert times(first.result()).ttft_ms


@pytest.mark.parametrize("body", [{"seconds": 0}, {"seconds": 1000}, {"second": 1}])
def test_what_makes_no_sense_is_refused(admin: httpx.Client, body: dict[str, Any]) -> None:
    assert admin.post("/admin/probe", json=body).status_code == 400


def test_a_key_is_needed(served: Endpoint) -> None:
    assert httpx.post(f"{served.url}/admin/probe", json={}).status_code == 401


# ── from probe to cause ──────────────────────────────────────────────────────────────────────────


def test_a_slower_engine_is_told_from_a_busy_host(admin: httpx.Client) -> None:
    """Each call of the model takes ten times as long. Where the host is quiet that is the engine; with a
    neighbour, which could do the same, it is the environment."""
    baseline = examine(admin, 3)
    assert admin.post("/admin/slow", json={"share": 9}).status_code == 200
    found = examine(admin, 8)
    assert admin.post("/admin/slow", json={"share": 0}).status_code == 200
    ratios = golden_ratios(found, baseline, CausePolicy())
    assert ratios is not None
    assert ratios.speed.read > 1.5
    assert ratios.speed.write > 1.5
    # Windows as clients would have met them. The real host is whatever else runs there just now.
    now = window(read_ms=100 * ratios.speed.read, write_ms=900 * ratios.speed.write)
    quiet, calm = (one.model_copy(update={"host": host(QUIET)}) for one in (found, baseline))
    before = window()
    cause = name_cause(before, now, quiet, calm)
    assert cause.kind == "engine", cause
    busy = QUIET.model_copy(update={"foreign_cores": 1.5})
    crowded = found.model_copy(update={"host": host(busy)})
    assert name_cause(before, now, crowded, calm).kind == "environment"


# ── the study's figures ──────────────────────────────────────────────────────────────────────────


def test_the_studys_figures_stand_in(tiny_bundle: Path) -> None:
    """Scaled to the golden prompt's length, with the versions it was built with."""
    manifest, bundle = open_bundle(tiny_bundle, verify=False)
    request = RequestShape.model_validate(manifest.evidence["request"], extra="ignore")
    shape = golden_shape(10_000, request)
    found = study_baseline(manifest, bundle.digest, shape)
    figures = manifest.evidence["metrics"]
    share = shape.prompt_tokens / request.prompt_tokens
    assert times(found).ttft_ms == pytest.approx((share * figures["ttft_ms"]["median"],))
    assert times(found).tpot_ms == pytest.approx((figures["tpot_ms"]["median"],))
    assert (found.source, found.host) == ("study", None)
    assert found.settings["onnxruntime"] == manifest.versions["onnxruntime"]


def test_a_bundle_without_figures_has_none(tiny_bundle: Path) -> None:
    manifest, bundle = open_bundle(tiny_bundle, verify=False)
    bare = manifest.model_copy(update={"evidence": {}})
    assert study_baseline(bare, bundle.digest, golden_shape(200, None)).golden is None


@pytest.mark.parametrize(
    ("room", "asked", "expected"),
    [
        (200, (512, 64), (184, 16)),
        (4096, (2000, 100), (512, 16)),
        (4096, (64, 4), (64, 4)),
        (2, (9, 9), (1, 1)),
    ],
)
def test_a_golden_request_is_short_and_fits(
    room: int, asked: tuple[int, int], expected: tuple[int, int]
) -> None:
    request = RequestShape(batch_size=1, prompt_tokens=asked[0], output_tokens=asked[1])
    found = golden_shape(room, request)
    assert (found.prompt_tokens, found.output_tokens) == expected
