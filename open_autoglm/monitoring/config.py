"""One file per service says what is watched, promised and done: ``infra/watch/NAME.yaml``.

Everything wrong with it is told at once, each with its line and how to mend it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from open_autoglm.errors import UserError
from open_autoglm.monitoring.judge import Policy
from open_autoglm.monitoring.shift import ShiftPolicy
from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.ladder import Rung
from open_autoglm.schemas.request import OptimizeSpec
from open_autoglm.schemas.study import without_password
from open_autoglm.schemas.watch import Slo
from open_autoglm.units import Duration

if TYPE_CHECKING:
    from yaml import Node

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DAY_MS = 24 * 3_600_000
_SHORTEST_MS = 5_000
"""For a rehearsal: what is so short says little."""
_SHORTEST_PROBE_MS, _LONGEST_PROBE_MS = 100, 120_000


class SloSpec(Model):
    """The promise, as it is written."""

    ttft_p95: Duration | None = Field(None, description="request to first token, for 95 % of the answers")
    tpot_p95: Duration | None = Field(None, description="each further token")
    e2e_p95: Duration | None = Field(None, description="request to last token")
    error_fraction: float = Field(0.01, ge=0, lt=1, description="of all requests: lost or refused")

    @property
    def slo(self) -> Slo:
        return Slo(
            ttft_p95_ms=self.ttft_p95.ms if self.ttft_p95 else None,
            tpot_p95_ms=self.tpot_p95.ms if self.tpot_p95 else None,
            e2e_p95_ms=self.e2e_p95.ms if self.e2e_p95 else None,
            error_fraction=self.error_fraction,
        )


class JudgeSpec(Model):
    """What it takes to call it a breach."""

    window: Duration = Field(Duration("15min"), description="of one judgement; the schedule runs as often")
    min_requests: int = Field(50, ge=1, description="fewer in a window say nothing")
    confirm_windows: int = Field(2, ge=1, le=8, description="running, to begin a breach and to end it")
    probe: Duration = Field(Duration("30s"), description="of endpoint and host, before a cause is named")
    cool_down: Duration = Field(Duration("6h"), description="after an act, until the next")
    baseline_windows: int = Field(
        96, ge=24, le=672, description="healthy ones before a version's first baseline: a day's"
    )

    @field_validator("probe")
    @classmethod
    def _as_an_endpoint_takes_it(cls, probe: Duration) -> Duration:
        if not _SHORTEST_PROBE_MS <= probe.ms <= _LONGEST_PROBE_MS:
            raise ValueError("a probe is a tenth of a second to two minutes long, such as 30s")
        return probe

    @field_validator("window")
    @classmethod
    def _of_a_sensible_length(cls, window: Duration) -> Duration:
        if not _SHORTEST_MS <= window.ms <= _DAY_MS:
            raise ValueError("a window is five seconds to a day long, such as 15min")
        return window


class ActionSpec(Model):
    """What may be done about a breach, from the ladder's first rung on."""

    highest_rung: Rung = Field(
        "quantise",
        description="quantise: every engine and precision; prune: then heads, too; recover: then "
        "teach pruned models what the whole one says",
    )
    canary_weight: float = Field(5, ge=0, le=50, description="per cent of the callers that meet a challenger")
    shadow_weight: float = Field(20, ge=0, le=100, description="per cent of the prompts asked of both")
    require_approval: bool = Field(False, description="a person says yes before a challenger is tried")


class WatchSpec(Model):
    """One service and how it is watched."""

    format_version: int = Field(FORMAT_VERSION, ge=FORMAT_VERSION, le=FORMAT_VERSION)
    service: str = Field(description="the model's public name", pattern=f"^{_NAME.pattern}$")
    endpoint: str = Field(description="its address", pattern=r"^https?://[^\s]+$")
    prometheus: str | None = Field(
        None, description="address of a Prometheus that reads it; without, the endpoint is read itself",
        pattern=r"^https?://[^\s]+$",
    )  # fmt: skip
    slo: SloSpec
    judge: JudgeSpec = JudgeSpec()
    action: ActionSpec = ActionSpec()
    optimize: OptimizeSpec = Field(description="the request that is made anew on a breach")

    @field_validator("endpoint", "prometheus")
    @classmethod
    def _can_be_asked(cls, address: str | None) -> str | None:
        if address is not None and (problem := _problem_of(address)) is not None:
            raise ValueError(f"{problem}: write an address like http://127.0.0.1:9090")
        return address

    @model_validator(mode="after")
    def _acts_within_its_means(self) -> Self:
        if self.judge.cool_down.ms < self.judge.window.ms:
            raise ValueError("judge.cool_down is shorter than judge.window: each window would be acted on")
        return self

    @property
    def probe_s(self) -> float:
        return self.judge.probe.ms / 1000

    @property
    def policy(self) -> Policy:
        return Policy(
            slo=self.slo.slo,
            window_s=self.judge.window.ms / 1000,
            min_requests=self.judge.min_requests,
            shift=ShiftPolicy(confirm=self.judge.confirm_windows),
            cool_down_s=self.judge.cool_down.ms / 1000,
        )


def _problem_of(address: str) -> str | None:
    """Why nobody can be asked there, in words."""
    import httpx

    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        return str(error)
    host = url.host
    if not host or host.startswith(".") or ".." in host or "%" in host:
        return "it names no host"
    if url.port is not None and not 0 < url.port < 1 << 16:
        return f"there is no port {url.port}"
    if url.query or url.fragment:
        return "it has a query or a fragment, and paths are added to it"
    return None


def watch_file(named: str, home: Path) -> Path:
    """The file itself, or that of a service: ``home/watches/NAME.yaml``, or the checkout's own.

    Raises UserError if there is none.
    """
    given = Path(named)
    if given.suffix in (".yaml", ".yml"):
        return given
    places = [home / "watches" / f"{named}.yaml", Path("infra/watch") / f"{named}.yaml"]
    for place in places:
        if _NAME.fullmatch(named) and place.is_file():
            return place
    raise UserError(f"no watch is known as {named!r}: write {places[0]}, like infra/watch/demo-glm.yaml")


def find_watch(named: str, home: Path) -> WatchSpec:
    """What `watch_file` finds. Raises UserError, also if the file of a name is about another service."""
    path = watch_file(named, home)
    spec = read_watch_spec(path)
    if path != Path(named) and spec.service != named:
        import yaml

        line = _line(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), ("service",))
        raise UserError(
            f"{path}:{line}: it is about `{spec.service}`: write `service: {named}`, or rename it"
        )
    return spec


def read_watch_spec(path: Path) -> WatchSpec:
    """Raises UserError: a sentence per mistake, each with ``file:line``."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_aliases(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_twice(path, root)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is not") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: this is not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(f"{path}:{line}: this is not YAML: {error.reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: this is not YAML: {error}") from None
    except ValueError as error:  # what looks like a date and is none
        raise UserError(f"{path}:{_odd_line(root)}: a value cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: a watch has two levels") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}:1: a watch is a mapping that begins with `service: NAME`")
    try:
        return WatchSpec.model_validate(content)
    except ValidationError as error:
        told = [f"{path}:{_line(root, e['loc'])}: {_words(e)}" for e in error.errors()]
        raise UserError("\n".join(told)) from None


def _refuse_aliases(path: Path, text: str) -> None:
    """A few lines of them can stand for more than memory holds, or for themselves."""
    import yaml

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise UserError(f"{path}:{line}: `*{event.anchor}` stands for another place: write it out")


def _refuse_twice(path: Path, root: Node | None) -> None:
    """YAML's loader takes the last of two equal keys without a word."""
    for keys in _mappings(root):
        seen: dict[str, int] = {}
        for name, line in keys:
            if name in seen:
                raise UserError(f"{path}:{line}: `{name}` is already given in line {seen[name]}: remove one")
            seen[name] = line


def _mappings(node: Node | None) -> Iterator[list[tuple[str, int]]]:
    """Keys and their lines, of each mapping in ``node``."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        yield [(str(key.value), key.start_mark.line + 1) for key, _ in node.value]
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _odd_line(node: Node | None) -> int:
    """Of the first value that is not what it looks like; 1 if each is."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        try:
            yaml.safe_load(node.value)
        except ValueError:
            return node.start_mark.line + 1
    values = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else []
    parts = node.value if isinstance(node, yaml.SequenceNode) else values
    return next((line for part in parts if (line := _odd_line(part)) > 1), 1)


def _line(node: Node | None, location: Sequence[int | str]) -> int:
    """Of the innermost part of ``location`` that is written; of what it is missing from, otherwise."""
    import yaml

    line = node.start_mark.line + 1 if node else 1
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        if found is None:
            return line
        key, node = found
        line = key.start_mark.line + 1
    return line


def _words(error: Any) -> str:
    name = ".".join(map(str, error["loc"])) or "the file"
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"`{name}` is missing: add it"
    if kind == "extra_forbidden":
        return f"`{name}` is not known: remove it, or mend its spelling"
    given = without_password(repr(error["input"]))
    return f"`{name}`: {message[:1].lower()}{message[1:]} (got {given})"
