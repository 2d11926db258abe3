"""All parts of the nightly promise on one machine, as `make up` and `make up-monitoring` start them, with
seconds for minutes; and somebody who calls all the while."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import stack
from bundles import altered, openable_study
from click.testing import CliRunner
from demo_host import demo_hardware
from endpoints import Endpoint, endpoint
from prefect_api import ask_prefect
from prometheus_server import free_port, hasten, wait_for
from registries import Shelf
from services import with_other_weights

from open_autoglm.bundle import build_bundle, open_bundle
from open_autoglm.cli.main import cli
from open_autoglm.hardware import probe_hardware
from open_autoglm.hardware_bench import Peaks
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas import Event, Judgement, OptimizeSpec
from open_autoglm.settings import Settings
from open_autoglm.tracking import Tracker

_LOG = logging.getLogger(__name__)
_LOG.setLevel(logging.INFO)

NAME = "tiny"
SLO_MS = 150
WINDOW_S = 10.0
PROMPT_TOKENS, OUTPUT_TOKENS = 14, 6
PAUSE_S = 0.7
MOST_LOOKS = 20
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PATIENCE_S = 600
"""For what takes seconds on an idle machine: others may have the cores."""

WATCH = """
service: {name}
endpoint: {endpoint}
prometheus: {prometheus}
slo: {{e2e_p95: {slo}ms}}
judge: {{window: {window:g}s, min_requests: 4, confirm_windows: 2, probe: 5s, cool_down: {window:g}s}}
action: {{canary_weight: 30, shadow_weight: 100}}
optimize:
  model_path: {model}
  engines: [onnxruntime]
  search_generations: 0
  rounds: 20  # of a millisecond each: some take a hundred times as long where others have the cores
  timing_budget_s: 60  # on a busy host; on another, the width ends it
  target_width: 0.3
  quality_tokens: 64
  min_quality: 0.5
  max_token_flips: 1
"""


class Callers:
    """One after the other, with pauses in which nobody is answered: twice as long as an answer, at least, so
    that champion and challenger can be compared in them however busy the host is."""

    def __init__(self, url: str) -> None:
        self.statuses: list[int] = []
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._ended.wait(max(PAUSE_S, 2 * max(self.seconds[-3:], default=0))):
                caller = f"caller {len(self.statuses)}"
                body = {"model": NAME, "prompt": f"{caller} asks for Paris", "user": caller}
                begin_s = time.perf_counter()
                try:
                    response = client.post(
                        "/v1/completions", json={**body, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
                    )
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return
                self.seconds.append(time.perf_counter() - begin_s)
                self.statuses.append(response.status_code)

    def more(self, count: int) -> list[float]:
        """The seconds of so many answers from now on."""
        known = len(self.statuses)
        wait_for(lambda: len(self.statuses) >= known + count or bool(self.failures), PATIENCE_S)
        assert self.failures == []
        return self.seconds[known:]

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@dataclass
class Stage:
    """What the test does to it, and what can be seen of it."""

    settings: Settings
    server: Endpoint
    shelf: Shelf
    slower_percent: float = 2000
    _begin_s: float = field(default_factory=time.monotonic)

    def mark(self, what: str) -> None:
        """Shown if the test fails."""
        _LOG.info("%6.1f s  %s", time.monotonic() - self._begin_s, what)

    # ── as users do ──────────────────────────────────────────────────────────────────────────────

    def command(self, *arguments: str) -> str:
        """``open-autoglm``, in this shell."""
        said = CliRunner().invoke(cli, list(arguments))
        assert said.exit_code == 0, said.output
        self.mark(f"open-autoglm {' '.join(arguments)}: {said.output.strip()}")
        return said.output

    def slower(self) -> None:
        """Half as slow again."""
        self.slower_percent *= 1.5
        self.command("slow", "--by", f"{self.slower_percent:.0f}%")

    def prefect(self, path: str, body: Mapping[str, Any]) -> Any:
        return ask_prefect(self.settings, path, body)

    def metrics(self) -> str:
        return httpx.get(f"{self.server.url}/metrics").text

    # ── flows ────────────────────────────────────────────────────────────────────────────────────

    def runs(self, deployment: str) -> list[Any]:
        """Oldest first; those of the schedule that are to come are none yet."""
        named = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.prefect("flow_runs/filter", named)
        return [run for run in found if not run["auto_scheduled"]]

    def deployment(self, name: str) -> str:
        (found,) = self.prefect("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return str(found["id"])

    def ended(self, deployment: str, by: str) -> Any:
        """The first run that was begun by a ``by`` of Prefect's, once it is over."""

        def found() -> Any:
            runs = ((run, run["created_by"] or {}) for run in self.runs(deployment))
            return next((run for run, whose in runs if whose.get("type") == by), None)

        wait_for(lambda: found() is not None, PATIENCE_S, every_s=0.5)
        return self.completed(found()["id"])

    def completed(self, run_id: str) -> Any:
        """The run, once it is over."""

        def found() -> Any:
            (run,) = self.prefect("flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
            return run

        wait_for(lambda: found()["state_type"] in ENDED, PATIENCE_S, every_s=0.5)
        run = found()
        self.mark(f"{run['name']}: {run['state_name']} after {run['total_run_time']:.1f} s")
        self.mark(self.logs(run_id))
        assert run["state_type"] == "COMPLETED"
        return run

    def look(self) -> Judgement:
        """One run of `regression`, as its schedule begins it; what it found."""
        path = f"deployments/{self.deployment('regression')}/create_flow_run"
        body = {"parameters": {"config": NAME}, "state": {"type": "SCHEDULED"}}
        run = self.prefect(path, body | {"idempotency_key": str(uuid4())})
        self.completed(run["id"])
        return self.judgements()[-1]

    def look_until(self, found: Callable[[Judgement], bool]) -> Judgement:
        """A busy host may have kept Prometheus from reading the endpoint, or have been slow itself."""
        for _ in range(MOST_LOOKS):
            if found(judgement := self.look()):
                return judgement
        pytest.fail(f"not in {MOST_LOOKS} looks; the last: {judgement.reasons}")

    def judgements(self) -> list[Judgement]:
        found = list(WatchStore(self.settings.home, NAME).history())
        self.mark(f"judged {found[-1].state}: {'; '.join(found[-1].reasons)}")
        return found

    def artifact(self, key: str) -> str:
        """The latest of that name, as people read it."""
        (found,) = self.prefect("artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
        self.mark(f"{key}: {found['data']}")
        return str(found["data"])

    def logs(self, run: str) -> str:
        asked = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        lines = self.prefect("logs/filter", asked)
        return "\n".join(f"{line['timestamp'][11:19]} {line['message']}" for line in lines)

    # ── the registry ─────────────────────────────────────────────────────────────────────────────

    def event(self, kind: str) -> Event:
        """The last of that kind, once there is one."""

        def last() -> Event | None:
            events = self.shelf.tracker.events(NAME, 20)
            return next((one for one in events if (one.kind, one.state) == (kind, "done")), None)

        wait_for(lambda: last() is not None, PATIENCE_S, every_s=0.5)
        found = last()
        assert found is not None
        self.mark(f"{found.kind} by {found.by}: {found.reason}")
        return found

    def try_bad_challenger(self) -> str:
        """A version that passes its exam, since it holds no golden prompts, and says something else than its
        study promised."""
        self.shelf._replace(bundles=self.shelf.bundles[1:]).register(NAME, 1, champion=None)
        found = self.shelf.client.search_model_versions(f"name = '{NAME}'")
        version = str(max(int(version.version) for version in found))
        self.command("canary", NAME, "--version", version, "--weight", "30", "--shadow", "100")
        return version

    def check_good_times(self) -> None:
        """The flow has kept a probe of this bundle."""
        window = self.judgements()[-1].window
        assert window is not None
        store = WatchStore(self.settings.home, NAME)
        assert store.probe(window.bundle_digest) is not None


def wait_until(condition: Callable[[], bool]) -> None:
    wait_for(condition, PATIENCE_S, every_s=0.5)


def environment(home: Path) -> dict[str, str]:
    """Of all processes: a home of its own, free ports, and nobody waits for long before he looks again."""
    ports = ("PREFECT", "MLFLOW", "PROMETHEUS", "ALERTMANAGER", "ALERT_BRIDGE")
    return {
        "AUTOGLM_HOME": str(home),
        "AUTOGLM_TRACKING_URI": "",
        "AUTOGLM_FOLLOW_S": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        **{f"AUTOGLM_{name}_PORT": str(free_port()) for name in ports},
    }


@contextmanager
def staged(checkpoint: Path, exact: Path, ledger: Path) -> Iterator[Stage]:
    """Everything up, and version 1 served: torch, as if its study had had nothing else. ``exact`` is a bundle
    of ONNX Runtime's, of which one with other weights is made."""
    settings = Settings()
    settings.home.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # the host's peaks decide nothing here, and take a while
        peaks = Peaks(**demo_hardware().model_dump(include=set(Peaks.model_fields)), foreign_share=0)
        patch.setattr("open_autoglm.hardware.measure_peaks", lambda *_: peaks)
        probe_hardware(settings.home / "hardware")
    if ledger.exists():
        shutil.copy(ledger, settings.ledger)
    shelf = _shelf(settings, checkpoint, exact)
    shelf.register(NAME, 1)
    options = ("--name", NAME, "--max-tokens", "200", "--slo-e2e", f"{SLO_MS}ms", "--threads", "1")
    with ThreadPoolExecutor(1) as aside:
        up = aside.submit(_stack, "up")
        try:
            with endpoint(Path(f"models:/{NAME}@champion"), settings.home, *options) as server:
                up.result()
                _monitor(settings, server, checkpoint)
                yield Stage(settings, server, shelf)
        finally:
            wait([up])
            _stack("down")


def _stack(*arguments: str) -> None:
    stack.cli.main(arguments, standalone_mode=False)


def _monitor(settings: Settings, server: Endpoint, checkpoint: Path) -> None:
    _stack("up-monitoring")
    hasten(settings.home / "prometheus")
    _stack("slo", NAME, "--e2e-p95-ms", str(SLO_MS))
    watch = settings.home / "watches" / f"{NAME}.yaml"
    watch.parent.mkdir()
    watch.write_text(
        WATCH.format(
            name=NAME,
            endpoint=server.url,
            prometheus=settings.prometheus_url,
            slo=SLO_MS,
            window=WINDOW_S,
            model=checkpoint,
        )
    )


def _shelf(settings: Settings, checkpoint: Path, exact: Path) -> Shelf:
    from mlflow import MlflowClient

    asked = OptimizeSpec(model_path=str(checkpoint), prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    study = openable_study(checkpoint, spec=asked)
    champion = build_bundle(study, study.trial(study.champion or ""), settings.home / "made" / "bundle")
    bad = altered(exact, settings.home / "mixed-up" / "bundle", with_other_weights)
    tracker = Tracker(settings.mlflow_uri, settings.mlflow_artifacts)
    client = MlflowClient(tracker.uri, registry_uri=tracker.uri)
    return Shelf(settings.home, tracker, client, [champion, open_bundle(bad)[1]])
