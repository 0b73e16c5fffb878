"""Certificates of devices: asked for in TLS, checked at CONNECT, and made for tests.

Python's ssl verifies every certificate that it asks a client for, and one that signed itself never passes.
So with pyOpenSSL: TLS proves that the client holds the key of what it shows; CONNECT decides whether that
will do. Sources: IoT Hub, "Authenticate identities with X.509 certificates"; a thumbprint's certificate has
to be valid in time and no more (Azure/iotedge#621); a module's common name is "device/module"
(MicrosoftDocs/azure-docs#63273).
"""

import hashlib
import os
import ssl
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL, crypto

from .registry import Refused

# Of what a device shows besides its own certificate.
_MAX_CHAIN = 10
_PIECE = 64 * 1024
_MAX_COMMON_NAME = 64  # characters, by RFC 5280
_YEAR = timedelta(days=365)


# ---------------------------------------------------------------------- TLS that asks


def _take_any(*_: Any) -> bool:
    return True  # CONNECT decides


class Asking:
    """A server's TLS that asks for a certificate, takes any, and goes on without one. TLS 1.2 and later.

    It stands in for an ssl.SSLContext in tls.Secured, and so do its wrap_bio()'s results for ssl.SSLObject.
    """

    def __init__(self, server_file: Path) -> None:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        # No session is resumed: it would come without the certificates between the device's and its CA's.
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_session_id(b"twin-device")
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_verify(SSL.VERIFY_PEER, _take_any)
        context.use_certificate_chain_file(str(server_file))
        context.use_privatekey_file(str(server_file))
        self._context = context

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *, server_side: bool) -> "_Tls":
        del server_side  # always
        return _Tls(SSL.Connection(self._context, None), incoming, outgoing)


class _Tls:
    """One connection, with the methods and errors of ssl.SSLObject that tls.Secured knows."""

    def __init__(self, tls: SSL.Connection, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        tls.set_accept_state()
        self._tls, self._incoming, self._outgoing = tls, incoming, outgoing

    def do_handshake(self) -> None:
        self._do(self._tls.do_handshake)

    def read(self, size: int, buffer: memoryview) -> int:
        try:
            count: int = self._do(self._tls.recv_into, buffer, size)
        except ssl.SSLZeroReturnError:
            return 0
        return count

    def write(self, data: memoryview) -> int:
        count: int = self._do(self._tls.send, data)
        return count

    def unwrap(self) -> None:
        self._do(self._tls.shutdown)

    def client_certificate(self) -> "Shown | None":
        """What the client has shown; None if nothing."""
        leaf = self._tls.get_peer_certificate()
        if leaf is None:
            return None
        chain = self._tls.get_peer_cert_chain() or []
        return Shown(_der(leaf), tuple(_der(one) for one in chain[:_MAX_CHAIN]))

    def _do(self, step: Callable[..., Any], *arguments: Any) -> Any:
        if self._incoming.pending:
            self._tls.bio_write(self._incoming.read())
        try:
            return step(*arguments)
        except SSL.WantReadError:
            raise ssl.SSLWantReadError from None
        except SSL.ZeroReturnError:
            raise ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "the client has said goodbye") from None
        except SSL.Error as error:
            reasons = error.args[0] if error.args and isinstance(error.args[0], list) else []
            words = ", ".join(str(one[-1]) for one in reasons)
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, words or "an end amid TLS") from None
        finally:
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._outgoing.write(self._tls.bio_read(_PIECE))
            except SSL.Error:
                return  # nothing is left


def _der(certificate: crypto.X509) -> bytes:
    return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)


# ---------------------------------------------------------------------- what is believed


class Shown:
    """The certificate that a client has shown, whose key it holds, and the others that came with it."""

    def __init__(self, der: bytes, chain: tuple[bytes, ...] = ()) -> None:
        self.der = der
        self.chain = chain

    @property
    def thumbprints(self) -> frozenset[str]:
        """SHA-1 and SHA-256, in capital hexadecimal digits."""
        return frozenset((_sha1(self.der), thumbprint(self.der)))

    def check_time(self, now: float) -> None:
        """Refused: it has expired, or is not valid yet. now: Unix seconds."""
        starts, ends, _ = self._read()
        if now < starts:
            raise Refused("the certificate is not valid yet")
        if now > ends:
            raise Refused("the certificate has expired")

    def check_name(self, name: str) -> None:
        """Refused: its subject's one common name is another."""
        _, _, names = self._read()
        if names != [name]:
            raise Refused(f"the certificate's common name is {', '.join(map(repr, names)) or 'missing'}")

    def _read(self) -> tuple[float, float, list[str]]:
        """Between which times it is valid, in Unix seconds, and its subject's common names."""
        try:
            read = x509.load_der_x509_certificate(self.der)
            names = read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            starts, ends = read.not_valid_before_utc, read.not_valid_after_utc
            return starts.timestamp(), ends.timestamp(), [str(one.value) for one in names]
        except Exception as error:  # noqa: BLE001  # whatever a stranger's bytes make of the parser
            raise Refused(f"the certificate cannot be read: {error!r}") from None


class Authorities:
    """The CAs that may vouch for devices. One between a root and a device will do, as with IoT Hub."""

    def __init__(self) -> None:
        self._certificates: list[crypto.X509] = []

    def add_file(self, path: str | Path) -> None:
        """Trust the CAs in a PEM file. ValueError: there is none in it, or it cannot be read."""
        try:
            found = x509.load_pem_x509_certificates(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path} holds no certificate in PEM: {error}") from None
        for one in found:
            try:
                is_ca = one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            except (x509.ExtensionNotFound, ValueError):
                is_ca = False
            if not is_ca:
                raise ValueError(f"{path} holds a certificate of no CA: {one.subject.rfc4514_string()}")
            self.add(one)

    def add(self, certificate: x509.Certificate) -> None:
        self._certificates.append(crypto.X509.from_cryptography(certificate))

    def check(self, shown: Shown, now: float) -> None:
        """Refused: no chain of what was shown leads to one of these."""
        store = crypto.X509Store()
        for one in self._certificates:
            store.add_cert(one)
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        store.set_time(datetime.fromtimestamp(now, timezone.utc))
        try:
            leaf, *chain = (
                crypto.load_certificate(crypto.FILETYPE_ASN1, one) for one in (shown.der, *shown.chain)
            )
            crypto.X509StoreContext(store, leaf, chain).verify_certificate()
        except crypto.X509StoreContextError as error:
            raise Refused(f"no CA for devices vouches for the certificate: {error}") from None
        except crypto.Error:
            raise Refused("the certificate's chain cannot be read") from None


def thumbprint(der: bytes) -> str:
    """SHA-256 in capital hexadecimal digits, as the service's own tools print it."""
    return hashlib.sha256(der).hexdigest().upper()


def _sha1(der: bytes) -> str:
    # Older identities carry these; whoever forges one gains a local hub.
    return hashlib.sha1(der, usedforsecurity=False).hexdigest().upper()


def thumbprint_of_file(path: str | Path) -> str:
    """The thumbprint of a PEM file's first certificate. ValueError: it has none. OSError: it is not read."""
    try:
        return thumbprint(_der(crypto.load_certificate(crypto.FILETYPE_PEM, Path(path).read_bytes())))
    except crypto.Error:
        raise ValueError(f"{path} holds no certificate in PEM") from None


# ---------------------------------------------------------------------- made for tests


class DeviceCertificate(NamedTuple):
    """Files in PEM. thumbprint: SHA-256 in hexadecimal. ca_file: None if it signed itself."""

    certificate_file: str
    key_file: str
    thumbprint: str
    ca_file: str | None


class Issuer:
    """A throw-away CA for devices."""

    def __init__(self, name: str = "twin-device hub, devices", above: "Issuer | None" = None) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(timezone.utc)
        self._key = key
        self.certificate = _sign(name, key, above, (now - 5 * _YEAR, now + 5 * _YEAR), is_ca=True)

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        return self._key


def make(
    folder: Path, name: str, common_name: str, issuers: list[Issuer], starts: float, ends: float
) -> DeviceCertificate:
    """Write a certificate and its key for the identity `name`.

    issuers: from the one that signs up to the root; empty if it signs itself. starts, ends: seconds from now.
    ValueError: a common name that no certificate has, or an end before the start.
    """
    if not 1 <= len(common_name) <= _MAX_COMMON_NAME:
        raise ValueError(
            f"a common name has 1 to {_MAX_COMMON_NAME} characters, not {len(common_name)}: {common_name!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(timezone.utc)
    times = (now + timedelta(seconds=starts), now + timedelta(seconds=ends))
    certificate = _sign(common_name, key, issuers[0] if issuers else None, times, is_ca=False)
    pem = serialization.Encoding.PEM
    # Ids have characters that file names have not.
    stem = quote(name, safe="")
    certificate_file, key_file, ca_file = (
        folder / f"{stem}.pem",
        folder / f"{stem}.key.pem",
        folder / "device-ca.pem",
    )
    between = [one.certificate for one in issuers[:-1]]
    certificate_file.write_bytes(b"".join(one.public_bytes(pem) for one in (certificate, *between)))
    key_file.unlink(missing_ok=True)
    # Nobody else may read it from the moment it is there.
    with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    if issuers:
        ca_file.write_bytes(issuers[-1].certificate.public_bytes(pem))
    der = certificate.public_bytes(serialization.Encoding.DER)
    return DeviceCertificate(
        str(certificate_file), str(key_file), thumbprint(der), str(ca_file) if issuers else None
    )


def _sign(
    common_name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: Issuer | None,
    times: tuple[datetime, datetime],
    *,
    is_ca: bool,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    signing_key = key if issuer is None else issuer.key
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(times[0])
        .not_valid_after(times[1])
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=is_ca, crl_sign=is_ca, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
        )
    )
    if not is_ca:
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usages, critical=False)
    return builder.sign(signing_key, hashes.SHA256())
