"""What Prefect was asked to begin, in tests that share one server."""

from __future__ import annotations

from typing import Any


def started(service: str, deployment: str = "reoptimize") -> list[Any]:
    """The runs of ``deployment`` that the watch of ``service`` has asked for."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterTags,
    )

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=["watch", service])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment])),
        )
