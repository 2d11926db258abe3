"""Other people's clients against the endpoint: unchanged, in an environment of their own (`make clients`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import Endpoint, endpoint

from open_autoglm.bundle import BundleModel

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / ".venv-clients" / "bin"
NAME = "tiny"

pytestmark = pytest.mark.skipif(
    not (CLIENTS / "aiperf").exists(), reason="the clients are not installed: make clients"
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    with endpoint(bundle, home, "--name", NAME, "--max-tokens", "400") as server:
        yield server


def run(*command: str | Path, cwd: Path) -> str:
    outcome = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        # Offline, AIPerf takes a tokenizer's directory for a name on the hub.
        env={**os.environ, "PYTHONPATH": "", "HOME": str(cwd), "HF_HUB_OFFLINE": ""},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    return outcome.stdout


def test_openais_client_gets_what_it_expects(served: Endpoint, bundle: Path, tmp_path: Path) -> None:
    """Its types take every answer, the text is the bundle's, and errors are the classes it has for them."""
    found: dict[str, Any] = json.loads(
        run(CLIENTS / "python", ROOT / "tests/clients/talk.py", served.url, NAME, "no-key", cwd=tmp_path)
    )
    model = BundleModel(bundle, max_tokens=400)
    expected = model.generate(["The capital of France is", "A model reads"], 12)
    model.close()
    assert found["models"] == [NAME]
    assert found["whole"] == found["pieces"] == expected[0]
    assert found["tokens"] == found["usage"] == found["logprobs"]
    assert found["several"] == [[0, expected[0]], [1, expected[0]], [2, expected[1]], [3, expected[1]]]
    assert found["chat"] == found["followed"]
    assert set(found["chat_logprobs"]) == {3}
    assert "is not served here" in found["unknown"]
    assert "shorten the prompt or lower max_tokens" in found["too_long"]


def test_a_public_load_generator_runs_to_its_end(served: Endpoint, bundle: Path, tmp_path: Path) -> None:
    """NVIDIA's AIPerf: every request is answered, and it reads our metrics under vLLM's names."""
    run(
        CLIENTS / "aiperf", "profile", "--model", NAME, "--url", served.url, "--endpoint-type", "chat",
        "--streaming", "--concurrency", "3", "--request-count", "12", "--isl", "40", "--osl", "16",
        "--extra-inputs", "ignore_eos:true", "--tokenizer", bundle / "tokenizer", "--ui", "none",
        "--output-artifact-dir", tmp_path / "found",
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "found" / "profile_export_aiperf.json").read_text())
    assert found["is_complete"]
    assert found["error_summary"] == []
    assert found["request_count"]["avg"] == 12
    assert found["usage_completion_tokens"]["min"] == found["usage_completion_tokens"]["max"] == 16
    assert found["time_to_first_token"]["count"] == 12
    scraped = json.loads((tmp_path / "found" / "server_metrics_export.json").read_text())["metrics"]
    assert {"vllm:time_to_first_token_seconds", "vllm:num_requests_running"} <= scraped.keys()
