"""A watch file is understood whole, or every mistake in it is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from open_autoglm.errors import UserError
from open_autoglm.monitoring.config import find_watch, read_watch_spec

EXAMPLE = Path(__file__).parent.parent / "infra" / "watch" / "demo-glm.yaml"


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = EXAMPLE.read_text()
    assert text.count(old) == 1
    path = tmp_path / "watch.yaml"
    path.write_text(text.replace(old, new))
    return path


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_example_says_what_it_says() -> None:
    spec = read_watch_spec(EXAMPLE)
    policy = spec.policy
    assert (spec.service, spec.endpoint, spec.prometheus) == ("demo-glm", "http://127.0.0.1:8000", None)
    assert (policy.slo.ttft_p95_ms, policy.slo.tpot_p95_ms, policy.slo.e2e_p95_ms) == (2000, 200, 20_000)
    assert (policy.window_s, policy.cool_down_s, policy.shift.confirm) == (900, 21_600, 2)
    assert (spec.optimize.prompt_tokens, spec.action.require_approval) == (512, False)


def test_its_comments_tell_the_defaults(tmp_path: Path) -> None:
    """What is left out has the value that the comment beside it promises."""
    short = tmp_path / "watch.yaml"
    short.write_text(
        "service: demo-glm\nendpoint: http://127.0.0.1:8000\n"
        "slo: {ttft_p95: 2s, tpot_p95: 200ms, e2e_p95: 20s}\n"
        "optimize: {model_path: .autoglm/demo-glm, prompt_tokens: 512, output_tokens: 64, max_latency: 2s}\n"
    )
    assert read_watch_spec(short) == read_watch_spec(EXAMPLE)


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        ("ttft_p95: 2s", "ttft_p95: 2", "ttft_p95", "`slo.ttft_p95`: input should be a valid string"),
        ("ttft_p95: 2s", "ttft_p95: '2'", "ttft_p95", "'2' has no unit: write a duration like 50ms"),
        ("ttft_p95: 2s", "ttft_p59: 2s", "ttft_p59", "`slo.ttft_p59` is not known: remove it, or mend"),
        ("min_requests: 50 #", "min_requests: 0 #", "min_requests", "greater than or equal to 1 (got 0)"),
        ("window: 15min #", "window: 4s #", "window: 4s", "a window is five seconds to a day long"),
        (
            "probe: 30s #",
            "probe: 3min #",
            "probe: 3min",
            "a probe is a tenth of a second to two minutes long",
        ),
        ("cool_down: 6h #", "cool_down: 5min #", "service", "judge.cool_down is shorter than judge.window"),
        ("  model_path: .autoglm/demo-glm\n", "", "optimize:", "`optimize.model_path` is missing: add it"),
        ("service: demo-glm", "service: ../demo", "service", "`service`: string should match pattern"),
        ("endpoint: http://", "endpoint: ftp://", "ftp:", "`endpoint`: string should match pattern"),
        (
            "highest_rung: quantise #",
            "highest_rung: best #",
            "highest_rung",
            "'prune' or 'recover' (got 'best')",
        ),
        ("judge:\n", "judge:\n  window: 15min\n", "window: 15min #", "`window` is already given in line"),
        ("service: demo-glm", "format_version: 2\nservice: demo-glm", "format_version", "equal to 1 (got 2)"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, where: str, said: str) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        read_watch_spec(path)
    assert f"{path}:{line_of(path, where)}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost:9090", "string should match pattern"),
        ("http://[::1", "invalid port: ':1'"),
        ("http://host:port", "invalid port: 'port'"),
        ("http://host:99999", "there is no port 99999"),
        ("http://:9090", "it names no host"),
        ("http://prometheus..local:9090", "it names no host"),
        ("http://host:9090/graph?g0.expr=up", "it has a query or a fragment"),
        ("http://user:secret@host:0", "there is no port 0"),
    ],
)
@pytest.mark.parametrize("name", ["prometheus", "endpoint"])
def test_an_address_that_nobody_can_be_asked_at_is_told(
    tmp_path: Path, name: str, address: str, said: str
) -> None:
    """Where it is written, before anything is asked, and without its password."""
    line = "endpoint: http://127.0.0.1:8000"
    wrong = f'{line}\nprometheus: "{address}"' if name == "prometheus" else f'endpoint: "{address}"'
    path = edited(tmp_path, line, wrong)
    with pytest.raises(UserError) as caught:
        read_watch_spec(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:{line_of(path, address)}: `{name}`: {said}")
    assert "\n" not in told
    assert "secret" not in told


def test_addresses_are_taken_as_they_are(tmp_path: Path) -> None:
    line = "endpoint: http://127.0.0.1:8000"
    for address in ("http://user:p@ss@host:9090/prometheus/", "https://[::1]:9090", "http://prometheus"):
        path = edited(tmp_path, line, f'{line}\nprometheus: "{address}"')
        assert read_watch_spec(path).prometheus == address


def test_a_name_is_about_its_own_service(tmp_path: Path) -> None:
    """A copy whose service was not changed would have another one watched, and nobody this one."""
    path = tmp_path / "watches" / "copied.yaml"
    path.parent.mkdir()
    path.write_text("# copied\n" + EXAMPLE.read_text())
    with pytest.raises(UserError) as caught:
        find_watch("copied", tmp_path)
    line = line_of(path, "service: demo-glm")
    assert str(caught.value).startswith(f"{path}:{line}: it is about `demo-glm`: write `service: copied`")
    path.rename(path.with_name("demo-glm.yaml"))
    assert find_watch("demo-glm", tmp_path).service == "demo-glm"
    assert find_watch(str(EXAMPLE), tmp_path).service == "demo-glm"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = edited(tmp_path, "ttft_p95: 2s", "ttft_p59: 2s\n  error_rate: 1")
    with pytest.raises(UserError) as caught:
        read_watch_spec(path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"slo: [1, 2\nservice: x", "watch.yaml:2: this is not YAML"),
        (b"service: \xff\xfe", "is not UTF-8 text: byte 9 is not"),
        (b"- service", "watch.yaml:1: a watch is a mapping"),
        (b"", "watch.yaml:1: a watch is a mapping"),
        (b"slo:\n  service: a\x00b", "watch.yaml:2: this is not YAML"),
        (b"a: &a [1]\nb: *a", "watch.yaml:2: `*a` stands for another place: write it out"),
        (b"a: &a [*a]", "watch.yaml:1: `*a` stands for another place"),
        (b"slo: {}\nservice: 2026-13-14", "watch.yaml:2: a value cannot be read: month must be in 1..12"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "watch.yaml is nested too deeply"),
        (b"? {a: b}\n: c", "watch.yaml:1: this is not YAML"),
        (b"!!python/object/apply:os.system ['true']", "watch.yaml:1: this is not YAML"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    """Nothing in it is run."""
    path = tmp_path / "watch.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="watch") as caught:
        read_watch_spec(path)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_watch_spec(tmp_path / "none.yaml")
