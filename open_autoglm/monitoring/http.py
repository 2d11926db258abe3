"""Asking a server something, briefly: it may be down, slow, or not what we think it is."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from open_autoglm.monitoring.windows import NoWindow

CONNECT_S = 2.0
TOTAL_S = 15.0
_MOST_BYTES = 64 << 20
_CLOCKS_S = 5.0
"""By so much may clocks differ: less than one read of the usual interval of 15 s."""


@dataclass(frozen=True)
class Answer:
    """A body, of status 200."""

    body: bytes
    headers: Mapping[str, str]
    asked_s: float
    """Our clock as we asked, since the epoch."""
    answered_s: float


def ask(
    who: str,
    url: str,
    *,
    parameters: Mapping[str, str],
    headers: Mapping[str, str] | None = None,
    trusted: ssl.SSLContext | None = None,
    local: bool = False,
) -> Answer | NoWindow:
    """GET from ``who`` at ``url``, for at most ``TOTAL_S``. ``local``: through no proxy."""
    answer: Future[Answer | NoWindow] = Future()

    def get() -> None:
        try:
            answer.set_result(_get(who, url, parameters, headers, trusted, local))
        except BaseException as error:
            answer.set_exception(error)
            raise

    # In a thread, since httpx bounds each read and not all of them: headers may come letter by letter.
    threading.Thread(target=get, daemon=True).start()
    try:
        return answer.result(CONNECT_S + TOTAL_S)
    except TimeoutError:
        return NoWindow(f"{who} had not answered after {TOTAL_S:g} s")


def _get(
    who: str,
    url: str,
    parameters: Mapping[str, str],
    headers: Mapping[str, str] | None,
    trusted: ssl.SSLContext | None,
    local: bool,
) -> Answer | NoWindow:
    asked_s, deadline = time.time(), time.monotonic() + TOTAL_S
    try:
        with (
            httpx.Client(
                timeout=httpx.Timeout(TOTAL_S, connect=CONNECT_S),
                verify=True if trusted is None else trusted,
                trust_env=not local,
            ) as client,
            client.stream("GET", url, params=parameters, headers=headers) as response,
        ):
            parts, size = [], 0
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    return NoWindow(f"{who} had not answered after {TOTAL_S:g} s")
                if size > _MOST_BYTES:
                    return NoWindow(f"{who} answered with more than {_MOST_BYTES >> 20} MiB")
            body = b"".join(parts)
    except httpx.TimeoutException:
        return NoWindow(f"{who} did not answer in time")
    except httpx.HTTPError as error:
        return NoWindow(f"{who} does not answer: {str(error) or type(error).__name__}")
    if response.status_code != 200:
        told = body.decode(errors="replace")[:200]
        return NoWindow(f"{who} answered with status {response.status_code}: {told}")
    return Answer(body, response.headers, asked_s, time.time())


def other_clock(who: str, theirs_s: float, answer: Answer) -> NoWindow | None:
    """If their clock is not ours: a window by our clock would be another one by theirs."""
    ahead_s = theirs_s - min(max(theirs_s, answer.asked_s), answer.answered_s)
    if abs(ahead_s) <= _CLOCKS_S:
        return None
    return NoWindow(
        f"the clock of {who} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} ours"
    )


def date_s(answer: Answer) -> float | None:
    """The server's clock by its ``Date``, in whole seconds; None if it did not send one."""
    try:
        return parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
