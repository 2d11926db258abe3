"""From a breach to its cause: what the serving host is asked, and what its answer is held against.

A probe taken in good times, one for each bundle, is kept beside the watch's memory. Until there is one, the
study's own figures stand in; once a day it is looked whether the host is still the same.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import httpx
from pydantic import ValidationError

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.monitoring.cause import name_cause
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.golden import study_baseline
from open_autoglm.monitoring.policy import CausePolicy
from open_autoglm.monitoring.promises import check_promises
from open_autoglm.monitoring.signs import changed_settings
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.monitoring.windows import NoWindow
from open_autoglm.schemas import Cause, EndpointProbe, Judgement, RequestShape, Stage
from open_autoglm.serving.local import LocalEndpoint, local_endpoints

_HOUR_S, _DAY_S = 3600.0, 86400.0
_SPARE_S = 30.0
"""For clients that are answered first, and for the probe's own end."""


class Served(NamedTuple):
    """The endpoint of this user on this machine that has the bundle which is judged."""

    here: LocalEndpoint
    bundle: Path


def find_served(home: Path, digest: str) -> Served | NoWindow:
    """Who answers with the bundle whose digest begins so."""
    for here in local_endpoints(home):
        try:
            champion = ask_admin(here, "GET", "/admin/fleet", timeout_s=10).json()["champion"]
            served = Served(here, Path(champion["bundle"]))
        except (httpx.HTTPError, OSError, KeyError, TypeError, ValueError):
            continue  # another version's, or on its way out, or its certificate is gone
        if str(champion["bundle_digest"]).startswith(digest):
            return served
    return NoWindow(f"no endpoint of this user on this machine has bundle {digest} as its champion")


def take_probe(served: Served, seconds: float) -> EndpointProbe | NoWindow:
    """So long on the serving host, in the endpoint's own process."""
    try:
        response = ask_admin(served.here, "POST", "/admin/probe", {"seconds": seconds}, seconds + _SPARE_S)
        return EndpointProbe.model_validate_json(response.content)
    except (httpx.HTTPError, OSError) as error:
        why = str(error) or type(error).__name__
        return NoWindow(f"the endpoint at {served.here.url} could not be probed: {why}")
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        return NoWindow(f"the endpoint at {served.here.url} answered with no probe: {told}")


def ask_admin(
    here: LocalEndpoint, method: str, path: str, body: dict[str, float] | None = None, timeout_s: float = 10
) -> httpx.Response:
    """Raises httpx.HTTPError, also where it refuses."""
    trusted = ssl.create_default_context(cafile=here.certificate) if here.certificate else True
    headers = {"Authorization": f"Bearer {here.token}"}
    with httpx.Client(verify=trusted, trust_env=False, timeout=timeout_s) as client:
        return client.request(method, f"{here.url}{path}", json=body, headers=headers).raise_for_status()


# ── what it is held against ──────────────────────────────────────────────────────────────────────


def remember_good_times(watch: WatchSpec, judgement: Judgement, store: WatchStore, home: Path) -> str | None:
    """Take a probe of a bundle that is well and has none, or an old one; why there is none, in words.

    A first window in which a promise is broken is no breach, but no good time either.
    """
    window = judgement.window
    if judgement.state != "ok" or window is None:
        return None
    kept, age_s = store.probe(window.bundle_digest), store.probe_age_s(window.bundle_digest, judgement.at)
    if kept is not None and age_s < (_DAY_S if _tells(kept) else _HOUR_S):
        return None
    if any(kept.chance < watch.policy.promise_error for kept in check_promises(window, watch.policy.slo)):
        return None
    served = find_served(home, window.bundle_digest)
    probe = served if isinstance(served, NoWindow) else take_probe(served, watch.probe_s)
    if isinstance(probe, NoWindow):
        return probe.reason
    if probe.slowed_share:
        return f"the engine was made {probe.slowed_share:.0%} slower to rehearse, which is no good time"
    return store.keep_probe(_the_better(kept, probe))


def _the_better(kept: EndpointProbe | None, probe: EndpointProbe) -> EndpointProbe:
    """The first of good times, lest an engine that becomes slower by and by takes them along; but a new one
    if host or libraries are others now: whatever is slow later would be put down to that for ever."""
    if kept is None or not _tells(kept):
        return probe
    return probe if _tells(probe) and changed_settings(probe, kept) else kept


def _tells(probe: EndpointProbe) -> bool:
    """Whether there are enough golden times in it to compare others with."""
    return probe.golden is not None and len(probe.golden.ttft_ms) >= CausePolicy().golden_samples


def diagnose(watch: WatchSpec, judgement: Judgement, store: WatchStore, home: Path) -> Cause:
    """Why the window of a breach is as it is; `unknown`, with the reason, where that cannot be found out."""
    now = judgement.window
    if now is None:
        return _unknown("there is no window to explain")
    served = find_served(home, now.bundle_digest)
    if isinstance(served, NoWindow):
        return _unknown(served.reason)
    good = store.good_window(now.bundle_digest, watch.judge.confirm_windows)
    if good is None:
        return _unknown("there is no good window of this bundle to compare with")
    probe = take_probe(served, watch.probe_s)
    if isinstance(probe, NoWindow):
        return _unknown(probe.reason)
    baseline = _baseline(store.probe(now.bundle_digest), served, probe)
    return name_cause(good, now, probe, baseline, stage=_stage(judgement))


def _baseline(kept: EndpointProbe | None, served: Served, probe: EndpointProbe) -> EndpointProbe | None:
    """What was kept; for golden times that it has not got, the study's."""
    if kept is not None and _tells(kept):
        return kept
    study = _of_the_study(served, probe)
    if kept is None or study is None:
        return kept or study
    return study.model_copy(update={"host": kept.host, "settings": kept.settings})


def _of_the_study(served: Served, probe: EndpointProbe) -> EndpointProbe | None:
    if probe.golden is None:
        return None
    shape = RequestShape(
        batch_size=1, prompt_tokens=probe.golden.prompt_tokens, output_tokens=probe.golden.output_tokens
    )
    try:
        manifest, bundle = open_bundle(served.bundle, verify=False)
        return study_baseline(manifest, bundle.digest, shape)
    except UserError:  # it was swapped and removed meanwhile, or holds no such figures
        return None


def _stage(judgement: Judgement) -> Stage:
    """What the breach is about: the stage that its first reason names, or the whole answer."""
    named = judgement.reasons[0].split(":")[0] if judgement.reasons else ""
    return "ttft" if named == "ttft" else "tpot" if named == "tpot" else "e2e"


def _unknown(reason: str) -> Cause:
    return Cause(kind="unknown", told=reason, evidence={})
