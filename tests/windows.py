"""Windows of a served model, by the means that a cause is named from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from open_autoglm.monitoring.golden import golden_times
from open_autoglm.schemas import (
    Conditions,
    EndpointProbe,
    GoldenTimes,
    Histogram,
    HostProbe,
    LatencyWindow,
    RequestShape,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
REQUESTS = 1000
QUIET = Conditions(foreign_cores=0.01)


def all_of(value: float, count: int = REQUESTS) -> Histogram:
    """So many equal values."""
    return Histogram(bounds=(value,), counts=(count, 0), sum=value * count)


def window(
    *,
    queue_ms: float = 10.0,
    read_ms: float = 100.0,
    write_ms: float = 900.0,
    prompt_tokens: float = 200.0,
    output_tokens: float = 31.0,
    requests: int = REQUESTS,
    refused: int = 0,
    cached_tokens: int = 0,
    seconds: float = 1000.0,
) -> LatencyWindow:
    """One request a second, each alike: 10 ms of waiting, 0.5 ms to read a token and 30 ms to write one."""
    ttft_ms, e2e_ms = queue_ms + read_ms, queue_ms + read_ms + write_ms
    return LatencyWindow(
        service="tiny",
        version="1",
        bundle_digest="0" * 12,
        begin=BEGIN,
        end=BEGIN + timedelta(seconds=seconds),
        source="endpoint",
        requests=requests,
        refused=refused,
        failed=0,
        restarts=0,
        times_ms={
            "queue": all_of(queue_ms, requests),
            "ttft": all_of(ttft_ms, requests),
            "tpot": all_of(write_ms / (output_tokens - 1), requests),
            "e2e": all_of(e2e_ms, requests),
        },
        prompt_tokens=all_of(prompt_tokens, requests),
        output_tokens=all_of(output_tokens, requests),
        cached_tokens=cached_tokens,
        memory_bytes=0,
    )


def golden(
    slower: float = 1.0, *, writing: float | None = None, count: int = 10, busy: float = 0
) -> GoldenTimes:
    """Requests that take ``slower`` times as long as once, or ``writing`` times after the first token."""
    spread = [1 + 0.01 * (number % 5) for number in range(count)]
    writing = slower if writing is None else writing
    shape = RequestShape(batch_size=1, prompt_tokens=128, output_tokens=16)
    return golden_times(shape, [(60 * slower * one, 28 * writing * one) for one in spread], busy_share=busy)


def host(conditions: Conditions = QUIET, **changes: object) -> HostProbe:
    return HostProbe.model_validate(
        {
            "begin": BEGIN,
            "seconds": 30.0,
            "cores": 4,
            "own_cores": 1.0,
            "conditions": conditions,
            "clock_mhz": 3000.0,
            **changes,
        }
    )


def probe(
    times: GoldenTimes | None = None, at: HostProbe | None = None, *, study: bool = False, **settings: str
) -> EndpointProbe:
    """Of a quiet host by default, with golden requests that take what they always did."""
    return EndpointProbe(
        source="study" if study else "probe",
        bundle_digest="0" * 12,
        golden=times if times is not None else golden(),
        host=None if study else at or host(),
        settings={"kernel": "6.1", "onnxruntime": "1.26.0", **settings},
    )
