"""prefect.yaml: what is deployed can be loaded, started and shown as a form; the pins Prefect lives by."""

from __future__ import annotations

from typing import Any

import alert_bridge
import pytest
import yaml
from conftest import REPOSITORY
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.optimize import optimize
from open_autoglm import engines
from open_autoglm.schemas import OptimizeSpec

DEPLOYMENTS = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])


def refused(parameters: dict[str, Any], flow: Flow[..., Any] = optimize) -> list[str]:
    """What Prefect's server has against the parameters of a new run."""
    schema = parameter_schema(flow).model_dump_for_openapi()
    return [error.message for error in validate(parameters, schema, raise_on_error=False)]


@each_deployment
def test_entrypoint_is_a_flow_whose_parameters_fit(deployment: dict[str, Any]) -> None:
    """Prefect loads each entry point by itself and accepts the deployed parameters."""
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    assert isinstance(flow, Flow)
    flow.validate_parameters(deployment["parameters"])
    assert refused(deployment["parameters"], flow) == []


@each_deployment
def test_schedules_are_valid(deployment: dict[str, Any]) -> None:
    """Each schedule's cron line and time zone can be read, and no slug is used twice."""
    for schedule in deployment["schedules"]:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    slugs = [schedule["slug"] for schedule in deployment["schedules"]]
    assert len(set(slugs)) == len(slugs)


@each_deployment
def test_one_run_at_a_time(deployment: dict[str, Any]) -> None:
    """A second study waits for the first instead of disturbing its timings, a second look for the first."""
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_an_alert_starts_a_look() -> None:
    """The event that the bridge tells is the one that is waited for, and names the service."""
    (trigger,) = next(d["triggers"] for d in DEPLOYMENTS if d["name"] == "regression")
    assert trigger["expect"] == [alert_bridge.EVENT]
    assert trigger["parameters"] == {"config": "{{ event.payload.service }}"}


def test_form_offers_the_installed_engines() -> None:
    """The form of a run lists the engines by name and the server refuses any other."""
    items = OptimizeSpec.model_json_schema()["properties"]["engines"]["items"]
    assert items["enum"] == list(engines.names())
    assert refused({"spec": {"model_path": "m", "engines": ["nope"]}}) != []


def test_form_has_a_text_box_for_each_optional_text() -> None:
    """Fields that may stay empty are plain strings; Prefect shows a union as a switch between types."""
    properties = OptimizeSpec.model_json_schema()["properties"]
    assert not [name for name, field in properties.items() if "anyOf" in field]
    assert all("title" in field and "description" in field for field in properties.values())


def test_server_accepts_a_stored_spec() -> None:
    """A spec as it was logged, with its empty fields, starts the same study again."""
    mix = {"scenario": "server", "request_rate_per_s": 2, "length_mix": "128/32:3,512/64:1"}
    spec = OptimizeSpec(model_path="m", max_latency="50ms", engines=("torch",), **mix)
    assert refused({"spec": spec.model_dump(mode="json")}) == []


@pytest.mark.parametrize(
    "field",
    [
        {"max_latency": "50"},
        {"max_memory": "-2GiB"},
        {"rounds": 1},
        {"target_device": "tpu"},
        {"scenario": "burst"},
        {"objective": "speed"},
        {"length_mix": "128"},
        {"request_rate_per_s": 0},
        {"target_width": 1},
        {"search_generations": 6},
    ],
    ids=str,
)
def test_server_refuses_what_the_spec_refuses(field: dict[str, Any]) -> None:
    """A wrong value is refused when the run is asked for, not minutes later."""
    assert refused({"spec": {"model_path": "m", **field}}) != []


def test_pins_that_keep_prefect_alive() -> None:
    """Prefect's server imports, and SQLAlchemy is below 2.1, with which schedules silently never fire."""
    import prefect.server.api.server
    import sqlalchemy

    assert prefect.server.api.server.create_app
    assert tuple(map(int, sqlalchemy.__version__.split(".")[:2])) < (2, 1)
