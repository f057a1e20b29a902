"""TLS as the daemons and clients use it: always mutual, names checked, one authority trusted.

The peer port and everything that Python's own TLS does is TLS 1.3; gRPC takes 1.2 too, and uses 1.3 between its own.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping

import grpc

from coordinator.model.errors import ConfigError
from coordinator.security.certificates import CertificateFiles, Identity, Role, parse_identity, role_dns_name


def server_context(files: CertificateFiles) -> ssl.SSLContext:
    """For the peer port: asks every caller for a certificate of the authority."""
    return _fill(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)


def client_context(files: CertificateFiles) -> ssl.SSLContext:
    """For dialling a peer: checks its name, which the caller gives as `server_hostname`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    return _fill(context, files)


def _fill(context: ssl.SSLContext, files: CertificateFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    for path in (files.authority, files.certificate, files.key):
        _read(path)
    try:
        context.load_verify_locations(files.authority)
        # With an empty password a key that has one is an error; without, OpenSSL would ask at the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"{files.certificate}: does not go with {files.key}: {reason_of(error)}"]) from None
    return context


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """For a gRPC port: asks every caller for a certificate of the authority."""
    authority, certificate, key = _read(files.authority), _read(files.certificate), _read(files.key)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def channel_credentials(files: CertificateFiles) -> grpc.ChannelCredentials:
    """For dialling a gRPC port."""
    return grpc.ssl_channel_credentials(_read(files.authority), _read(files.key), _read(files.certificate))


def channel_options(cluster: str, role: Role) -> list[tuple[str, str]]:
    """Options of a channel to any daemon of a role: the name that its certificate must carry, whatever its address."""
    name = role_dns_name(cluster, role)
    return [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]


def peer_identity(certificate: Mapping[str, object] | None) -> Identity | None:
    """The identity in what `SSLObject.getpeercert()` returned."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    assert isinstance(names, tuple)
    return _only_one(value for kind, value in names if kind == "URI")


SUBJECT_NAMES = "x509_subject_alternative_name"
"""Where gRPC's auth context has the names of the caller's certificate."""


def caller_identity(auth_context: Mapping[str, Iterable[bytes]]) -> Identity | None:
    """The identity in `ServicerContext.auth_context()`; None on a plain-text port."""
    names = auth_context.get(SUBJECT_NAMES, ())
    return _only_one(name.decode("utf-8", "replace") for name in names)


def _only_one(names: Iterable[str]) -> Identity | None:
    # Two identities in one certificate would let its holder choose; that is none.
    identities = [identity for identity in map(parse_identity, names) if identity is not None]
    return identities[0] if len(identities) == 1 else None


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not accepted",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "WRONG_VERSION_NUMBER": "it speaks plain text, not TLS",
    "HTTP_REQUEST": "it speaks plain text, not TLS",
    "UNKNOWN_PROTOCOL": "it speaks plain text, not TLS",
    "UNSUPPORTED_PROTOCOL": "it speaks an old TLS; 1.3 is needed",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate and was shown none",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept our certificate, which is of an authority that it does not know",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it does not accept our certificate, whose time is over",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "KEY_VALUES_MISMATCH": "the key is another's",
}
"""OpenSSL's names in words. "It" is the other side."""


def reason_of(error: BaseException) -> str:
    """Why a handshake or a connection failed, for people: never empty."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message or 'it cannot be verified'}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return _REASONS.get(error.reason, error.reason.lower().replace("_", " "))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _read(path: object) -> bytes:
    try:
        with open(str(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}; make it with `clusterctl certs issue`"]) from None
