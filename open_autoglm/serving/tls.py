"""Certificates."""

from __future__ import annotations

import ssl
from pathlib import Path

from open_autoglm.errors import UserError
from open_autoglm.schemas import Model


class TlsOptions(Model):
    """Files in PEM."""

    certificate: Path
    """The server's, then those that vouch for it."""
    key: Path


class _Encrypted(Exception):
    """OpenSSL asks for a password."""


def tls_context(options: TlsOptions) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate. Raises UserError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (options.certificate, options.key):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        context.load_cert_chain(options.certificate, options.key, password=_no_password)
    except _Encrypted:
        raise UserError(
            f"the key {options.key} is encrypted: decrypt it with `openssl pkey -in {options.key} -out FILE`"
        ) from None
    except ssl.SSLError as error:
        raise UserError(_reason(error, options)) from error
    return context


def _no_password() -> str:
    raise _Encrypted


def _reason(error: ssl.SSLError, options: TlsOptions) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the key {options.key} does not belong to the certificate {options.certificate}"
    return f"{options.certificate} and {options.key} are no certificate and key in PEM: {error}"
