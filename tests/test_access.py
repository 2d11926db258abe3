"""Who is let in: keys, rates, names, certificates."""

from __future__ import annotations

import datetime
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asgi
import httpx
import pytest
from click.testing import CliRunner
from endpoints import Endpoint, endpoint, metric

from open_autoglm.cli.main import cli
from open_autoglm.errors import UserError
from open_autoglm.serving.access import Access, AccessOptions, known_hosts
from open_autoglm.serving.keys import Bucket, Key, digest_of_key, find, keys_of, read_keys
from open_autoglm.serving.local import LocalEndpoint, announced, local_endpoints
from open_autoglm.serving.tls import TlsOptions, tls_context

NAME = "tiny"
ASK, ADMIN, SLOW = "ask-0123456789abcdef", "admin-0123456789abcdef", "slow-0123456789abcdef"
JSON = {"Content-Type": "application/json"}


def key(secret: str, name: str = "someone", **more: Any) -> Key:
    return Key(name=name, digest=digest_of_key(secret), **more)


def line(secret: str, *words: str) -> str:
    return " ".join([*words[:1], f"sha256:{digest_of_key(secret).hex()}", *words[1:]])


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


def test_a_new_keys_line_lets_it_in(keys_file: Path) -> None:
    """As the command prints them; the file holds no key."""
    said = CliRunner().invoke(cli, ["new-key", "ops", "--admin", "--rate", "9/min"])
    assert said.exit_code == 0
    secret, written = (line.partition(": ")[2] for line in said.output.splitlines())
    assert len(secret) > 40
    assert secret not in written
    keys_file.write_text(f"# ours\n\n{line(ASK, 'someone')}  # a comment\n{written}\n")
    keys = read_keys(keys_file)
    assert [(key.name, key.admin, key.rate_per_min) for key in keys] == [
        ("someone", False, None),
        ("ops", True, 9),
    ]
    assert find(keys, secret) == keys[1]
    assert find(keys, ASK) == keys[0]
    assert find(keys, secret + "x") is None
    assert find(keys, "") is None


SPOILT = {
    "no digest": ("someone", "line 2: write NAME"),
    "a key": (f"someone {ASK}", "line 2: write NAME"),
    "half a digest": ("someone sha256:abcd", "line 2: write NAME"),
    "an odd name": (line(ASK, "some/one"), "line 2: 'some/one' is no name"),
    "a reserved name": (line(ASK, "anonymous"), "line 2: 'anonymous' is no name"),
    "an odd rate": (line(ASK, "someone", "rate=9/s"), "is no rate"),
    "no rate at all": (line(ASK, "someone", "rate=0/min"), "is no rate"),
    "another word": (line(ASK, "someone", "root"), "line 2: write NAME"),
    "a name twice": (f"{line(ASK, 'a')}\n{line(SLOW, 'a')}", "line 3: the name a is on line 2"),
    "a key twice": (f"{line(ASK, 'a')}\n{line(ASK, 'b')}", "line 3: this key is on line 2"),
    "nothing": ("", "holds no key"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_refused_with_its_line(keys_file: Path, name: str) -> None:
    content, said = SPOILT[name]
    keys_file.write_text(f"# keys\n{content}\n")
    with pytest.raises(UserError, match=said):
        read_keys(keys_file)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_for_others_eyes_is_refused(keys_file: Path, mode: int) -> None:
    keys_file.write_text(line(ASK, "someone"))
    keys_file.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        read_keys(keys_file)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_keys_of_the_environment_have_lasting_names() -> None:
    """By what they are, not by where they stand."""
    first, second = keys_of(f"{ASK}, {SLOW}", "AUTOGLM_API_KEYS", admin=False)
    assert keys_of(f" {SLOW},", "AUTOGLM_API_KEYS", admin=False) == (second,)
    assert find((first, second), SLOW) == second
    assert keys_of("", "AUTOGLM_API_KEYS", admin=False) == ()


def test_a_short_key_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError, match="of 7 characters") as refused:
        keys_of("hunter2", "AUTOGLM_API_KEYS", admin=False)
    assert "hunter2" not in str(refused.value)


def test_a_bucket_holds_a_minute_and_fills_steadily() -> None:
    """By the clock it is given; the wait it tells is the wait it needs."""
    now = [100.0]
    bucket = Bucket(30, clock=lambda: now[0])
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == pytest.approx(2.0)
    now[0] += 1.5
    assert bucket.take() == pytest.approx(0.5)
    now[0] += 0.5
    assert bucket.take() == 0.0
    now[0] += 3600
    assert [bucket.take() for _ in range(31)].count(0.0) == 30


# ── what each may do ─────────────────────────────────────────────────────────────────────────────


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    """Answers with the caller's name."""
    body = scope["state"]["caller"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def guarded(*keys: Key, loopback: bool = True, rate: int | None = None, hosts: tuple[str, ...] = ()) -> Any:
    """A client of `_app`, and the reasons that were counted."""
    reasons: list[str] = []
    app = Access(
        _app,
        AccessOptions(keys=keys, rate_per_min=rate, hosts=hosts),
        admin=key(ADMIN, "local-admin", admin=True),
        hosts=known_hosts("127.0.0.1" if loopback else "0.0.0.0", hosts, loopback=loopback),
        loopback=loopback,
        refused=reasons.append,
    )
    return asgi.Client(app), reasons


NO_KEY = None
RIGHTS = [
    # who, path, on loopback, status
    (NO_KEY, "/healthz", False, 200),
    (NO_KEY, "/readyz", False, 200),
    (NO_KEY, "/metrics", True, 200),
    (NO_KEY, "/metrics", False, 401),
    (NO_KEY, "/docs", True, 200),
    (NO_KEY, "/openapi.json", False, 401),
    (NO_KEY, "/v1/models", True, 401),
    (NO_KEY, "/elsewhere", True, 401),
    (NO_KEY, "//v1/models", True, 401),
    (NO_KEY, "/healthz/", True, 401),
    (NO_KEY, "/admin/swap", True, 401),
    (NO_KEY, "/admin", True, 401),
    ("wrong", "/v1/models", True, 401),
    ("wrong", "/admin/swap", True, 401),
    (ASK, "/v1/models", False, 200),
    (ASK, "/metrics", False, 200),
    (ASK, "/admin/swap", True, 403),
    (ADMIN, "/admin/swap", False, 200),
    (ADMIN, "/v1/models", True, 200),
]


@pytest.mark.parametrize(("secret", "path", "loopback", "status"), RIGHTS)
def test_a_key_opens_what_it_is_for(secret: str | None, path: str, loopback: bool, status: int) -> None:
    client, _ = guarded(key(ASK), loopback=loopback)
    answer = client.get(path, headers=bearer(secret) if secret else {})
    assert answer.status == status
    if status >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == ("admin_key_needed" if status == 403 else "invalid_api_key")
        assert ("www-authenticate" in answer.headers) == (status == 401)


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer ", f"Basic {ASK}", ASK, f"Bearer {ASK},", "Bearer \xff\xfe"]
)
def test_what_is_no_key_is_none(value: str) -> None:
    client, _ = guarded(key(ASK))
    assert client.get("/v1/models", headers={"Authorization": value}).status == 401


def test_the_caller_is_known_by_name() -> None:
    """The scheme's case does not matter (RFC 9110, section 11.1)."""
    client, _ = guarded(key(ASK))
    assert client.get("/v1/models", headers={"Authorization": f"bearer {ASK}"}).body == b"someone"
    assert client.get("/healthz").body == b"anonymous"


def test_without_keys_all_may_ask_and_nobody_administers() -> None:
    """But the server's own key. Clients of OpenAI's always send some key: it is passed over."""
    client, _ = guarded()
    assert client.get("/v1/models").body == b"anonymous"
    assert client.get("/v1/models", headers=bearer("sk-whatever")).body == b"anonymous"
    assert client.get("/admin/swap").status == 401
    assert client.get("/admin/swap", headers=bearer("sk-whatever")).status == 401
    assert client.get("/admin/swap", headers=bearer(ADMIN)).body == b"local-admin"


def test_a_rate_is_a_keys_own() -> None:
    """Other keys and other paths do not count; who comes too often learns when to come back."""
    client, reasons = guarded(key(ASK), key(SLOW, "slow", rate_per_min=2), rate=3)
    assert [client.get("/v1/models", headers=bearer(SLOW)).status for _ in range(3)] == [200, 200, 429]
    assert reasons == ["rate_limited"]
    assert [client.get("/v1/models", headers=bearer(ASK)).status for _ in range(4)] == [200] * 3 + [429]
    assert client.get("/metrics", headers=bearer(SLOW)).status == 200
    assert client.get("/v1/models", headers=bearer(ADMIN)).status == 200
    refused = client.get("/v1/models", headers=bearer(SLOW))
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30


# ── web pages ────────────────────────────────────────────────────────────────────────────────────


STRANGE = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "",
    "localhost:80:80", "evil.example#localhost",
]  # fmt: skip
KNOWN = ["127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]:8000", "[::1]", "models.lan:8000"]


@pytest.mark.parametrize(
    ("host", "status"), [*((host, 200) for host in KNOWN), *((host, 403) for host in STRANGE)]
)
def test_on_loopback_only_known_names_are_answered(host: str, status: int) -> None:
    """Whatever else is right: a page that has rebound its name sends that name."""
    client, _ = guarded(key(ASK), hosts=("models.lan",))
    assert client.get("/healthz", headers={"Host": host}).status == status
    assert client.get("/v1/models", headers={"Host": host, **bearer(ASK)}).status == status


def test_elsewhere_names_are_checked_if_some_are_given() -> None:
    client, _ = guarded(key(ASK), loopback=False)
    assert client.get("/healthz", headers={"Host": "any.example"}).status == 200
    client, _ = guarded(key(ASK), loopback=False, hosts=("models.lan",))
    assert client.get("/healthz", headers={"Host": "any.example"}).status == 403
    assert client.get("/healthz", headers={"Host": "models.lan"}).status == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=application/json", 415),
        (None, 415), ("text/plain; application/json", 415),
    ],
)  # fmt: skip
def test_a_post_is_json(kind: str | None, status: int) -> None:
    """A page may send the others without asking the server first."""
    client, _ = guarded()
    headers = {"Content-Type": kind} if kind else {}
    assert client.request("POST", "/v1/completions", headers=headers).status == status


# ── certificates ─────────────────────────────────────────────────────────────────────────────────


def certificate(folder: Path, name: str, password: bytes | None = None) -> TlsOptions:
    """A new key and its own certificate for the loopback address."""
    pytest.importorskip("cryptography")
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(private, hashes.SHA256())
    )
    options = TlsOptions(certificate=folder / f"{name}.crt", key=folder / f"{name}.key")
    pem, protection = serialization.Encoding.PEM, serialization.NoEncryption()
    encrypted = serialization.BestAvailableEncryption(password) if password else protection
    options.certificate.write_bytes(made.public_bytes(pem))
    options.key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, encrypted))
    return options


def test_certificates_that_will_not_do_are_said_at_once(tmp_path: Path) -> None:
    one, other = certificate(tmp_path, "one"), certificate(tmp_path, "other")
    locked = certificate(tmp_path, "locked", b"secret")
    with pytest.raises(UserError, match="does not belong"):
        tls_context(TlsOptions(certificate=one.certificate, key=other.key))
    with pytest.raises(UserError, match="is encrypted"):
        tls_context(locked)
    with pytest.raises(UserError, match="cannot be read"):
        tls_context(TlsOptions(certificate=tmp_path / "none", key=one.key))
    with pytest.raises(UserError, match="no certificate and key"):
        tls_context(TlsOptions(certificate=one.key, key=one.key))
    assert tls_context(one).minimum_version == ssl.TLSVersion.TLSv1_2


# ── commands on this machine ─────────────────────────────────────────────────────────────────────


def test_a_server_is_found_while_it_runs(tmp_path: Path) -> None:
    """Its file is its owner's alone. A dead server's, half a file, and one others can read are not used."""
    here = LocalEndpoint(url="http://127.0.0.1:7", pid=os.getpid(), token="t")
    dead = here.model_copy(update={"pid": 2**22 + 1})
    with announced(tmp_path, 70, here), announced(tmp_path, 8, dead):
        path = tmp_path / "endpoints" / "70.json"
        assert path.stat().st_mode & 0o777 == 0o600
        assert local_endpoints(tmp_path) == (here,)
        (tmp_path / "endpoints" / "9.json").write_text("{")
        assert local_endpoints(tmp_path) == (here,)
        path.chmod(0o644)
        assert local_endpoints(tmp_path) == ()
        path.chmod(0o600)
    assert not path.exists()
    assert local_endpoints(tmp_path) == ()


def test_a_file_that_another_server_took_over_is_left_to_it(tmp_path: Path) -> None:
    first = LocalEndpoint(url="http://127.0.0.1:7", pid=os.getpid(), token="first")
    second = first.model_copy(update={"token": "second"})
    with announced(tmp_path, 7, first):
        with announced(tmp_path, 7, second):
            assert local_endpoints(tmp_path) == (second,)
            (tmp_path / "endpoints" / "7.json").write_text(first.model_dump_json())
        assert local_endpoints(tmp_path) == (first,)


# ── a real server ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def secured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """With a certificate, keys from both places, and a rate."""
    folder = tmp_path_factory.mktemp("secured")
    tls, keys = certificate(folder, "server"), folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{line(SLOW, 'slow', 'rate=3/min')}\n")
    options = ("--name", NAME, "--keys", str(keys), "--max-tokens", "100")
    files = ("--tls-cert", str(tls.certificate), "--tls-key", str(tls.key))
    environment = {"AUTOGLM_API_KEYS": ASK, "AUTOGLM_ADMIN_KEYS": ADMIN}
    with endpoint(tiny_bundle, folder, *options, *files, environment=environment) as server:
        yield server


@pytest.fixture
def https(secured: Endpoint) -> Iterator[httpx.Client]:
    trusted = ssl.create_default_context(cafile=str(secured.home / "server.crt"))
    with httpx.Client(base_url=secured.url, verify=trusted, timeout=60) as client:
        yield client


def test_a_secured_server_answers_those_with_keys(secured: Endpoint, https: httpx.Client) -> None:
    """Over TLS, whose certificate is checked; from the environment, and from the file with its rate."""
    assert secured.url.startswith("https://")
    body = {"model": NAME, "prompt": "The capital", "max_tokens": 2}
    assert https.get("/healthz").status_code == 200
    assert https.post("/v1/completions", json=body).status_code == 401
    for secret in (ASK, ADMIN):
        found = https.post("/v1/completions", json=body, headers=bearer(secret))
        assert found.status_code == 200, found.text
    statuses = [https.get("/v1/models", headers=bearer(SLOW)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    text = https.get("/metrics").text
    assert metric(text, "autoglm_requests_refused_total", reason="rate_limited") == 1


def test_commands_of_this_user_may_administer_it(secured: Endpoint, https: httpx.Client) -> None:
    """By the file alone, which says how its certificate is checked; it is gone with the server."""
    (here,) = local_endpoints(secured.home)
    assert (here.url, here.pid) == (secured.url, secured.process.pid)
    assert here.certificate == secured.home / "server.crt"
    assert https.get("/admin/none").status_code == 401
    assert https.get("/admin/none", headers=bearer(ASK)).status_code == 403
    for secret in (ADMIN, here.token):
        assert https.get("/admin/none", headers=bearer(secret)).status_code == 404
    assert here.token not in Path(f"/proc/{secured.process.pid}/cmdline").read_text()


def test_a_secured_server_ends_without_traces(secured: Endpoint) -> None:
    """Last, since it ends it: no token stays behind, and no key was ever written."""
    assert secured.stop() == 0
    assert list((secured.home / "endpoints").iterdir()) == []
    secured._reader.join()
    said = "".join(secured.said)
    assert not [secret for secret in (ASK, ADMIN, SLOW) if secret in said]
    assert {json.loads(line)["caller"] for line in secured.said if "/v1/" in line} >= {"slow"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nobody_is_exposed_by_accident(tiny_bundle: Path, tmp_path: Path, host: str) -> None:
    """The refusal says how to mend it, and costs no loading."""
    with pytest.raises(AssertionError, match=r"error: anybody who reaches .*--keys.*--no-keys"):
        Endpoint(tiny_bundle, tmp_path, "--host", host)


def test_contradictions_are_refused(tiny_bundle: Path, keys_file: Path) -> None:
    keys_file.write_text(line(ASK, "someone"))
    found = CliRunner().invoke(cli, ["serve", str(tiny_bundle), "--keys", str(keys_file), "--no-keys"])
    assert isinstance(found.exception, UserError)
    found = CliRunner().invoke(cli, ["serve", str(tiny_bundle), "--tls-cert", str(keys_file)])
    assert "--tls-key" in str(found.exception)
