"""Whom the shells trust, and the device's own certificate: each file that cannot be right is named."""

import datetime
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from twin_device import ConnectRefused, LocalError, tls
from twin_device import TwinClient as ThreadClient
from twin_device.aio import TwinClient as AsyncClient

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def made(folder: Path, name: str = "dev", **options: Any) -> tuple[str, str]:
    """A device's certificate and its key, in two files."""
    folder.mkdir(exist_ok=True)
    issued = trustme.CA().issue_cert(common_name=name, **options)
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return str(certificate), str(key)


def test_a_pair_of_files_is_presented_and_checked(tmp_path: Path) -> None:
    context = tls.context(None, made(tmp_path))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_the_same_files_share_a_context_until_one_is_replaced(tmp_path: Path) -> None:
    pair = made(tmp_path)
    context = tls.context(None, pair)
    assert tls.context(None, pair) is context
    assert tls.context(None) is not context
    made(tmp_path)
    assert tls.context(None, pair) is not context


def test_clients_of_one_process_share_a_trust_store(tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = tls.context(str(tmp_path / "ca.pem"))
    assert tls.context(tmp_path / "ca.pem") is context
    (tmp_path / "copy.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
    assert tls.context(tmp_path / "copy.pem") is not context


def encrypted(pair: tuple[str, str], password: bytes) -> tuple[str, str]:
    key = serialization.load_pem_private_key(Path(pair[1]).read_bytes(), None)
    Path(pair[1]).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )
    )
    return pair


def test_a_key_may_have_a_password(tmp_path: Path) -> None:
    pair = encrypted(made(tmp_path), b"open")
    assert tls.context(None, (*pair, "open"))
    for wrong in ((*pair, "shut"), pair):
        with pytest.raises(
            LocalError, match=r"the key in '.*dev\.key' cannot be read: .* password"
        ) as raised:
            tls.context(None, wrong)
        assert "shut" not in str(raised.value)


def spoilt(tmp_path: Path, how: str) -> tuple[str, str]:
    pair = made(tmp_path)
    if how == "no certificate":
        os.remove(pair[0])
    elif how == "no key":
        os.remove(pair[1])
    elif how == "swapped":
        return pair[1], pair[0]
    elif how == "certificate twice":
        return pair[0], pair[0]
    elif how == "another key":
        return pair[0], made(tmp_path, "other")[1]
    elif how == "damaged key":
        text = Path(pair[1]).read_text().splitlines()
        Path(pair[1]).write_text("\n".join([text[0], "x" * 64, text[-1]]))
    return pair


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no certificate", r"certificate file '.*dev\.pem' cannot be read: No such file"),
        ("no key", r"key file '.*dev\.key' cannot be read: No such file"),
        ("swapped", r"certificate file '.*dev\.key' holds no certificate in PEM form"),
        ("certificate twice", r"key file '.*dev\.pem' holds no key in PEM form"),
        ("another key", r"the key in '.*other\.key' does not belong to the certificate in '.*dev\.pem'"),
        ("damaged key", r"the key in '.*dev\.key' cannot be read: it is damaged"),
    ],
)
def test_files_that_cannot_be_right_are_named(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(LocalError, match=message):
        tls.context(None, spoilt(tmp_path, how))


@pytest.mark.parametrize("wrong", [("one",), (1, 2), ("a", "b", "c", "d"), "dev.pem"])
def test_what_is_no_pair_of_files_is_refused(wrong: Any) -> None:
    with pytest.raises(LocalError, match="certificate is a pair of files"):
        tls.context(None, wrong)


def test_a_certificate_that_is_not_valid_now_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = made(tmp_path, "old", not_before=NOW - 3 * DAY, not_after=NOW - DAY)
    with pytest.raises(ConnectRefused, match=r"'.*old\.pem' is not valid: certificate has expired") as raised:
        tls.context(None, expired)
    assert not raised.value.can_retry
    early = made(tmp_path, "early", not_before=NOW + DAY, not_after=NOW + 3 * DAY)
    with pytest.raises(ConnectRefused, match=r"'.*early\.pem' is not valid: certificate is not yet valid"):
        tls.context(None, early)
    # One that expires while the program runs.
    pair = made(tmp_path, "soon", not_before=NOW - DAY, not_after=NOW + DAY)
    assert tls.context(None, pair)
    later = (NOW + 2 * DAY).timestamp()
    monkeypatch.setattr(tls.time, "time", lambda: later)
    with pytest.raises(ConnectRefused, match=f"has expired on {NOW + DAY:%Y-%m-%d}"):
        tls.context(None, pair)


REFUSED = [
    ({}, "key or its certificate"),
    ({"key": "MDEy", "certificate": ("a", "b")}, "key or its certificate"),
    ({"certificate": ("a", "b"), "tls": False}, "a certificate needs tls"),
    (
        {"certificate": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "ca_file": "ca.pem"},
        "says whom to trust",
    ),
]


@pytest.mark.parametrize("client", [ThreadClient, AsyncClient])
@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_options_that_exclude_each_other(client: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalError, match=message):
        client("localhost", "dev", **options)


@pytest.mark.parametrize("client", [ThreadClient, AsyncClient])
def test_a_connection_string_may_leave_the_key_to_a_certificate(client: Any, tmp_path: Path) -> None:
    text = "HostName=localhost;DeviceId=dev;x509=true"
    assert client.from_connection_string(text, certificate=made(tmp_path)).state == "offline"
    with pytest.raises(LocalError, match="key or its certificate"):
        client.from_connection_string(text)
    with pytest.raises(LocalError, match="exclude each other"):
        client.from_connection_string(f"{text};SharedAccessKey=MDEy", certificate=made(tmp_path))
