"""Why a connection did not come about, when gRPC only says that it did not: one look of our own, for people.

Nothing is decided by it, and nothing is sent but a TLS handshake.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

from coordinator.security.certificates import Role, role_dns_name
from coordinator.security.credentials import Credentials
from coordinator.security.tls import reason_of

LOOK_TIMEOUT_S = 1.0


def tls_problem(address: str, credentials: Credentials | None, role: Role = Role.MASTER) -> str:
    """What is wrong between this party and a gRPC port, in words; empty when that is not TLS, or nothing is."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), LOOK_TIMEOUT_S) as connection:
            return _handshake_problem(connection, credentials, role)
    except (OSError, ValueError):
        return ""


def _handshake_problem(connection: socket.socket, credentials: Credentials | None, role: Role) -> str:
    if credentials is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        # Nothing is said to whoever answers; this only tells TLS from plain text.
        context.verify_mode = ssl.CERT_NONE
        with contextlib.suppress(OSError), context.wrap_socket(connection):
            return 'it asks for a certificate, but this side is set to plain text (security.mode = "plaintext")'
        return ""
    context = credentials.client_context()
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=role_dns_name(credentials.identity.cluster, role)) as tls:
            # In TLS 1.3 a caller hears that its certificate is refused only after its own handshake is done.
            return "" if tls.recv(1) else "it ended the connection; it may not accept our certificate"
    except ssl.SSLError as error:
        return reason_of(error)
    except TimeoutError:
        return ""
    except OSError:
        return "it ended the connection; it may speak plain text, or not accept our certificate"
