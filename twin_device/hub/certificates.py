"""A throw-away CA and the hub's own certificate, made by trustme, or what the user keeps in a folder."""

import ssl
from pathlib import Path

_NAMES = ("localhost", "127.0.0.1", "::1")


def prepare(folder: Path, host_names: tuple[str, ...]) -> Path:
    """Have ca.pem and server.pem (key and chain) in folder; returns the path of ca.pem.

    They are used when there, made when neither is, with ca.der for boards. ValueError: only one is there.
    ModuleNotFoundError: they are to be made, and trustme is not installed.
    """
    ca_file, server_file = folder / "ca.pem", folder / "server.pem"
    if ca_file.exists() and server_file.exists():
        return ca_file
    for one, other in ((ca_file, server_file), (server_file, ca_file)):
        if one.exists():
            raise ValueError(f"{folder} has {one.name} but no {other.name}: give both, or an empty folder")
    import trustme  # only here: a hub without TLS, or with certificates of its own, needs none

    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    names = tuple(dict.fromkeys((*_NAMES, *host_names)))
    server = authority.issue_cert(*names)
    # The key first: nobody else may read it from the moment it is there.
    server_file.touch(mode=0o600)
    server_file.write_bytes(
        server.private_key_pem.bytes() + b"".join(blob.bytes() for blob in server.cert_chain_pems)
    )
    authority.cert_pem.write_to_path(str(ca_file))
    (folder / "ca.der").write_bytes(ssl.PEM_cert_to_DER_cert(ca_file.read_text()))
    return ca_file


def server_context(folder: Path) -> ssl.SSLContext:
    """A server's TLS context, TLS 1.2 and later. ValueError: server.pem is no certificate with its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A pass phrase, so that nobody is asked for one on the terminal.
        context.load_cert_chain(folder / "server.pem", password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"{folder / 'server.pem'} is no certificate with its key in PEM: {error.reason}"
        ) from None
    return context
