"""TLS of the CPython shells: whom to trust, and the device's own certificate."""

import contextlib
import math
import os
import ssl
import threading
import time
import weakref

from .core.errors import ConnectRefused, LocalError

Path = str | os.PathLike[str]
# A certificate's file (PEM, with its chain), its key's file (PEM), and the key's password if it has one; or a
# context that has all of this, and whom to trust, already.
Certificate = tuple[Path, Path] | tuple[Path, Path, str] | ssl.SSLContext

# A trust store takes megabytes and milliseconds: the clients of one process share it.
_contexts: "weakref.WeakValueDictionary[tuple[object, ...], ssl.SSLContext]" = weakref.WeakValueDictionary()
# When a context's certificate expires, or why it is not valid.
_until: "weakref.WeakKeyDictionary[ssl.SSLContext, float | str]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
# OpenSSL's numbers of verification errors (X509_V_ERR_...).
_NOT_YET_VALID, _EXPIRED = 9, 10
# What a hub's alert says of the device's certificate, in OpenSSL's words (RFC 8446, 6.2).
_ALERTS = (
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "CERTIFICATE_REQUIRED",
)


def context(ca_file: Path | None, certificate: Certificate | None = None) -> ssl.SSLContext:
    """The context for these files, TLS 1.2 and later, with certificate and host name checks; shared by all
    who ask for the same ones. A file that was replaced is another file.

    LocalError names the file that cannot be right. ConnectRefused: the device's certificate is not valid now.
    """
    if isinstance(certificate, ssl.SSLContext):
        return certificate
    key = tuple(_identity(kind, path) for kind, path in _files(ca_file, certificate))
    with _lock:
        found = _contexts.get(key)
        if found is None:
            found = _trusting(ca_file)
            if certificate is not None:
                _present(found, certificate)
                _until[found] = _valid_until(certificate)
            _contexts[key] = found
    if certificate is not None:
        _check_dates(os.fspath(certificate[0]), _until[found])
    return found


def refusal(where: str, error: OSError) -> ConnectRefused:
    """Why there is no connection to a host: the error of its dial in words, and whether to try again soon."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectRefused(
            f"the certificate of {where} is not to be trusted: {error.verify_message}", False
        )
    if isinstance(error, ssl.SSLError) and any(alert in str(error.reason) for alert in _ALERTS):
        return ConnectRefused(f"{where} refuses the device's certificate: {error.reason}", False)
    return ConnectRefused(f"cannot connect to {where}: {error.strerror or error}")


def _files(ca_file: Path | None, certificate: tuple[object, ...] | None) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = [] if ca_file is None else [("ca_file", ca_file)]
    if certificate is not None:
        if len(certificate) not in (2, 3) or not all(
            isinstance(part, (str, os.PathLike)) for part in certificate
        ):
            raise LocalError(
                "certificate is a pair of files, (certificate, key), with the key's password as a third, "
                "or an ssl.SSLContext"
            )
        files += [("certificate file", certificate[0]), ("key file", certificate[1])]  # type: ignore[list-item]  # just checked
    return files


def _identity(kind: str, path: Path) -> tuple[object, ...]:
    try:
        with open(path, "rb"):
            found = os.stat(path)
    except OSError as error:
        raise LocalError(f"{kind} {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    return (kind, os.path.abspath(path), found.st_mtime_ns, found.st_size, found.st_ino)


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        made = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise LocalError(f"ca_file {os.fspath(ca_file or '')!r} holds no certificate in PEM form") from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    return made


def _present(made: ssl.SSLContext, certificate: tuple[Path, ...]) -> None:
    """Have a context present the device's certificate."""
    path, key = os.fspath(certificate[0]), os.fspath(certificate[1])
    for kind, name, word in (("certificate", path, b"CERTIFICATE-----"), ("key", key, b"PRIVATE KEY-----")):
        with open(name, "rb") as file:
            if word not in file.read(1 << 20):
                raise LocalError(f"{kind} file {name!r} holds no {kind} in PEM form")
    try:
        # A password, so that OpenSSL asks nobody on the terminal.
        made.load_cert_chain(path, key, str(certificate[2]) if len(certificate) > 2 else "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"does not belong to the certificate in {path!r}"
        else:
            why = "cannot be read: it is damaged, or its password is another one"
        raise LocalError(f"the key in {key!r} {why}") from None


def _check_dates(path: str, until: float | str) -> None:
    """ConnectRefused if it is not valid now. until: Unix seconds, or what OpenSSL says against it."""
    if isinstance(until, str):
        raise ConnectRefused(f"the certificate in {path!r} is not valid: {until}", False)
    if time.time() > until:
        date = time.strftime("%Y-%m-%d", time.gmtime(until))
        raise ConnectRefused(
            f"the certificate in {path!r} is not valid: certificate has expired on {date}", False
        )


def _valid_until(certificate: tuple[Path, ...]) -> float | str:
    """When a certificate expires, in Unix seconds; or why it is not valid today.

    The ssl module tells a certificate's dates only to who has verified it: here that is a server in memory
    that trusts this very certificate.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    server.load_verify_locations(certificate[0])
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It speaks to the server above and to nobody else.
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for made in (server, client):
        _present(made, certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(10):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        # Other objections, such as to what it is for, are the hub's business.
        return error.verify_message if error.verify_code in (_NOT_YET_VALID, _EXPIRED) else math.inf
    found = ends[1].getpeercert() or {}
    return ssl.cert_time_to_seconds(str(found["notAfter"])) if "notAfter" in found else math.inf
