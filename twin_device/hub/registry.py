"""Who may connect: identities, their keys, the hub's policies, and the check of what CONNECT brings.

Sources: IoT Hub, "Control access with shared access signatures" and "Understand the identity registry".
"""

import base64
import binascii
import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    # It needs more than the standard library; who has devices with keys alone does without.
    from .x509 import Authorities, Shown

_ID = re.compile(r"[A-Za-z0-9\-:.+%_#*?!(),=@;$']{1,128}\Z")
# Rights of the policies that every hub begins with.
_POLICIES = {
    "iothubowner": {"ServiceConnect", "DeviceConnect", "RegistryRead", "RegistryWrite"},
    "service": {"ServiceConnect"},
    "device": {"DeviceConnect"},
    "registryRead": {"RegistryRead"},
    "registryReadWrite": {"RegistryRead", "RegistryWrite"},
}
_THUMBPRINT = re.compile(r"([0-9A-Fa-f]{40}|[0-9A-Fa-f]{64})\Z")
# Of identities that connect with a certificate.
_X509 = ("selfSigned", "certificateAuthority")


class Refused(Exception):
    """CONNECT is refused. The reason is for the hub's own log; the device is told only "not authorized"."""


class Disabled(Refused):
    """CONNECT is refused, since the identity is disabled."""


def make_key() -> str:
    """A new key as the hub makes them: 32 random bytes in base64."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def check_key(key: str) -> str:
    """The key, if it is base64; ValueError, without the key, if it is none."""
    try:
        if base64.b64decode(key, validate=True):
            return key
    except (binascii.Error, ValueError):
        pass
    raise ValueError("a key is not base64")


def is_thumbprint(text: str) -> bool:
    """True for a SHA-1 or SHA-256 in hexadecimal digits."""
    return _THUMBPRINT.match(text) is not None


@dataclass
class Identity:
    """A device or a module. Keys never show in repr."""

    device_id: str
    module_id: str | None
    primary_key: str = field(repr=False)
    secondary_key: str = field(repr=False)
    enabled: bool = True
    model_id: str = ""
    status_reason: str | None = None
    # "sas", or how else it says who it is: "selfSigned", "certificateAuthority", "none".
    authentication: str = "sas"
    thumbprints: tuple[str | None, str | None] = (None, None)
    # What the back end notes; the hub does nothing with it.
    managed_by: str = ""
    is_edge: bool = False
    # Tells an identity from one of the same name that was deleted before.
    generation: str = field(default_factory=lambda: str(secrets.randbelow(10**18)))
    changes: int = field(default_factory=lambda: secrets.randbelow(10**9))

    @property
    def id(self) -> str:
        """ "device" or "device/module": also the client identifier of MQTT."""
        return self.device_id if self.module_id is None else f"{self.device_id}/{self.module_id}"

    @property
    def etag(self) -> str:
        """Base64 of a decimal number that every change makes another."""
        return base64.b64encode(str(self.changes).encode()).decode()

    def change(
        self,
        *,
        enabled: bool,
        status_reason: str | None,
        authentication: str,
        primary_key: str | None,
        secondary_key: str | None,
        thumbprints: tuple[str | None, str | None],
        managed_by: str,
        is_edge: bool,
    ) -> None:
        """Take over what the back end wrote; a key that is None stays as it was."""
        self.enabled, self.status_reason = enabled, status_reason
        self.managed_by, self.is_edge = managed_by, is_edge
        self.authentication, self.thumbprints = authentication, thumbprints
        self.primary_key = primary_key or self.primary_key
        self.secondary_key = secondary_key or self.secondary_key
        self.changes += 1

    @property
    def uses_certificate(self) -> bool:
        """It connects with a certificate, not with a token."""
        return self.authentication in _X509

    @property
    def resource(self) -> str:
        """What a token has to cover, behind the host name."""
        tail = "" if self.module_id is None else f"/modules/{self.module_id}"
        return f"/devices/{self.device_id}{tail}"


@dataclass
class Claim:
    """What a CONNECT says of itself, checked. expiry: of its token, in Unix seconds; infinite without one."""

    identity: Identity
    expiry: float
    api_version: str | None


class Registry:
    """The identities of one hub."""

    def __init__(self, host_names: tuple[str, ...], owner_key: str | None = None) -> None:
        if not host_names or not all(host_names):
            raise ValueError("a hub has at least one host name")
        self.host_names = tuple(name.lower() for name in host_names)
        self.policy_key = check_key(owner_key) if owner_key else make_key()
        self.identities: dict[str, Identity] = {}
        # Who may vouch for devices; None: nobody.
        self.authorities: Authorities | None = None
        self._with_certificate: set[str] = set()

    @property
    def asks_for_certificates(self) -> bool:
        """True if there is a device whose certificate could count."""
        return self.authorities is not None or bool(self._with_certificate)

    def note(self, identity: Identity) -> None:
        """Take notice of how an identity connects from now on."""
        if identity.uses_certificate:
            self._with_certificate.add(identity.id)
        else:
            self._with_certificate.discard(identity.id)

    def create(self, identity_id: str, key: str | None = None) -> Identity:
        """Add a device, or a module ("device/module"). ValueError: it exists, or the id or key is bad."""
        device_id, slash, module_id = identity_id.partition("/")
        for part in (device_id, module_id) if slash else (device_id,):
            if not _ID.match(part):
                raise ValueError(
                    f"{identity_id!r} is not an id: 1 to 128 letters, digits and -:.+%_#*?!(),=@;$'"
                )
        if identity_id in self.identities:
            raise ValueError(f"{identity_id!r} exists already")
        identity = Identity(
            device_id, module_id if slash else None, check_key(key) if key else make_key(), make_key()
        )
        self.identities[identity_id] = identity
        return identity

    def delete(self, identity_id: str) -> list[str]:
        """Remove an identity, a device with its modules; returns the ids that are gone. KeyError: unknown."""
        del self.identities[identity_id]
        modules = [other for other in self.identities if other.startswith(identity_id + "/")]
        for other in modules:
            del self.identities[other]
        self._with_certificate.difference_update((identity_id, *modules))
        return [identity_id, *modules]

    def authenticate(
        self, client_id: str, user_name: str, password: str, now: float, shown: "Shown | None" = None
    ) -> Claim:
        """The claim of a CONNECT; Refused if it is not to be believed. now: Unix seconds. shown: in TLS."""
        host, identity_id, parameters = _parse_user_name(user_name)
        if host not in self.host_names:
            raise Refused(f"the user name names the host {host!r}, this hub is {', '.join(self.host_names)}")
        if client_id != identity_id:
            raise Refused("client identifier and user name name different identities")
        identity = self.identities.get(identity_id)
        if identity is None:
            raise Refused("no such identity")
        device = self.identities.get(identity.device_id, identity)
        if not identity.enabled or not device.enabled:
            raise Disabled("the identity is disabled")
        if identity.uses_certificate:
            self._check_certificate(identity, password, shown, now)
            expiry = math.inf
        elif identity.authentication == "sas":
            if shown is not None and not password:
                raise Refused("a certificate is shown, and the identity connects with a key")
            expiry = self._check_token(identity, password, now)
        else:
            raise Refused(f"an identity of authentication {identity.authentication!r} does not connect")
        if "model-id" in parameters:
            identity.model_id = parameters["model-id"]
        return Claim(identity, expiry, parameters.get("api-version") or None)

    def authorize(self, token: str, path: str, now: float) -> set[str]:
        """The rights of a back end's token for a request to path; Refused if it is not to be believed."""
        fields = _parse_token(token)
        policy = fields.get("skn", "")
        if policy not in _POLICIES:
            raise Refused("the token names no policy of this hub (skn)")
        self._verify(fields, [self.policy_key], path, now)
        return _POLICIES[policy]

    def token(self, policy: str, expiry: int) -> str:
        """A back end's token for the whole hub. expiry: Unix seconds."""
        resource = quote(self.host_names[0], safe="")
        digest = hmac.digest(
            base64.b64decode(self.policy_key), f"{resource}\n{expiry}".encode(), hashlib.sha256
        )
        signature = quote(base64.b64encode(digest), safe="")
        return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}&skn={policy}"

    def _check_certificate(
        self, identity: Identity, password: str, shown: "Shown | None", now: float
    ) -> None:
        if password:
            raise Refused("there is a password, and the identity connects with a certificate")
        if shown is None:
            raise Refused("the identity connects with a certificate, and none is shown")
        shown.check_time(now)
        if identity.authentication == "selfSigned":
            wanted = {one.upper() for one in identity.thumbprints if one}
            if wanted.isdisjoint(shown.thumbprints):
                raise Refused("the certificate's thumbprint is none of the identity's")
            return
        if self.authorities is None:
            raise Refused("this hub knows no CA for devices")
        self.authorities.check(shown, now)
        shown.check_name(identity.id)

    def _check_token(self, identity: Identity, token: str, now: float) -> float:
        fields = _parse_token(token)
        policy = fields.get("skn")
        if policy:
            if "DeviceConnect" not in _POLICIES.get(policy, ()):
                raise Refused("the token's policy may not connect devices")
            return self._verify(fields, [self.policy_key], identity.resource, now)
        return self._verify(fields, [identity.primary_key, identity.secondary_key], identity.resource, now)

    def _verify(self, fields: dict[str, str], keys: list[str], path: str, now: float) -> float:
        """The expiry of a token for path that is signed with one of keys."""
        resource, signature, expiry_text = fields["sr"], fields["sig"], fields["se"]
        if not (expiry_text.isascii() and expiry_text.isdigit() and len(expiry_text) < 16):
            raise Refused("the token's expiry is no number")
        # The signature covers the resource as it stands in the token, still encoded.
        signed = f"{resource}\n{expiry_text}".encode()
        wanted = [
            base64.b64encode(hmac.digest(base64.b64decode(key), signed, hashlib.sha256)) for key in keys
        ]
        given = unquote(signature).encode()
        if not any([hmac.compare_digest(given, one) for one in wanted]):  # noqa: C419  # every key, every time
            raise Refused("the token's signature is wrong")
        if not self._covers(resource, path):
            raise Refused("the token is for another resource")
        if int(expiry_text) <= now:
            raise Refused("the token has expired")
        return float(expiry_text)

    def _covers(self, resource: str, path: str) -> bool:
        # Ids with special characters are encoded once by some clients and twice by others.
        for decoded in (unquote(resource), unquote(unquote(resource))):
            host, slash, rest = decoded.partition("/")
            host = host.partition(":")[0].lower()
            if host in self.host_names:
                given = (slash + rest).rstrip("/")
                if path == given or f"{path}/".startswith(f"{given}/"):
                    return True
        return False


def _parse_user_name(user_name: str) -> tuple[str, str, dict[str, str]]:
    """Host, identity and parameters of "{host}/{device}[/{module}]/?api-version=..."."""
    head, slash, tail = user_name.rpartition("/")
    if not slash or not (tail.startswith("?") or "api-version=" in tail or not tail):
        # Hobby clients leave the parameters out altogether.
        head, tail = user_name, ""
    segments = head.split("/")
    if len(segments) not in (2, 3) or not all(segments):
        raise Refused("the user name is not {host}/{device}[/{module}]/?api-version=...")
    parameters: dict[str, str] = {}
    for pair in tail.lstrip("?").split("&"):
        name, _, value = pair.partition("=")
        parameters.setdefault(name, unquote(value))
    return segments[0].partition(":")[0].lower(), "/".join(segments[1:]), parameters


def _parse_token(token: str) -> dict[str, str]:
    prefix, space, rest = token.partition(" ")
    fields = dict(pair.partition("=")[::2] for pair in rest.split("&"))
    if prefix != "SharedAccessSignature" or not space or not {"sr", "sig", "se"} <= fields.keys():
        raise Refused("there is no shared access signature")
    return fields
