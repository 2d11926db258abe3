"""What the endpoint's own document says of it, against what a running server does (schemathesis)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoints import Endpoint, endpoint, metric

from open_autoglm.serving.local import local_endpoints

pytest.importorskip("schemathesis")

ROUTES = {
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/healthz", "/readyz",
    "/metrics", "/admin/fleet", "/admin/swap", "/admin/challenger", "/admin/promote",
    "/admin/history", "/admin/probe", "/admin/slow", "/admin/renew",
}  # fmt: skip
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
EXAMPLES = "25"
"""Of each route, besides those at the edges of its types."""


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("openapi")
    with endpoint(tiny_bundle, home, "--name", "tiny", "--max-tokens", "60") as server:
        yield server


def test_every_route_is_in_the_document(served: Endpoint) -> None:
    """With its errors; no route answers 422, as FastAPI says unasked."""
    document = httpx.get(f"{served.url}/openapi.json").json()
    assert set(document["paths"]) == ROUTES
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "default" in operation["responses"]
            assert "422" not in operation["responses"]


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """What may be asked of this very server, or hardly a request would get as far as its engine."""
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        fields = schemas[name]["properties"]
        fields["model"]["enum"] = ["tiny"]
        for limit in fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields[limit]["anyOf"][0]["maximum"] = 8
    del document["paths"]["/admin/probe"]  # it takes half a minute, unless told otherwise
    schemas["SlowRequest"]["properties"]["share"]["maximum"] = 1
    document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"]["enum"] = ["tiny", "other"]
    return document


def test_what_the_document_says_is_true(served: Endpoint, tmp_path: Path) -> None:
    """Of right requests and wrong ones alike: no 5xx, and no answer of another type or shape."""
    (here,) = local_endpoints(served.home)
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(narrowed(httpx.get(f"{served.url}/openapi.json").json())))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", served.url),
        *("--header", f"Authorization: Bearer {here.token}", "--checks", CHECKS, "--max-examples", EXAMPLES),
        *("--seed", "1", "--phases", "examples,coverage,fuzzing", "--generation-database", "none"),
        *("--suppress-health-check", "all", "--request-timeout", "30", "--no-color"),
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr[-2000:]
    answered = metric(httpx.get(f"{served.url}/metrics").text, "vllm:request_success_total")
    assert answered >= 30, "too few requests were understood to show anything"
