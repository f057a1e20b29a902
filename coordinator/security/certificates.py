"""The cluster's own certificate authority and the leaf certificates of its daemons and people.

A leaf says who its holder is in the subject alternative name, as the URI `coordinator://CLUSTER/ROLE/ID`. For servers
it also carries two DNS names that no public authority gives out: `ID.ROLE.CLUSTER.coordinator` and
`ROLE.CLUSTER.coordinator`. Who dials checks one of them, never the address: the first where one certain daemon is meant
(a peer), the second where any of a role will do (a master). So certificates need not change when machines get other
addresses.

The authority's own certificate says which cluster it is for, as the URI `coordinator://CLUSTER`; what it signs is for
that cluster. Keys are on the curve P-256. Private keys are written with mode 0600 and appear in no message and no log.
"""

from __future__ import annotations

import datetime
import enum
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.configuration.fields import check_id
from coordinator.model.errors import ConfigError, InvalidRequest

SCHEME = "coordinator"
AUTHORITY_NAME = "authority"
AUTHORITY_DAYS = 3_650
LEAF_DAYS = 825
ENDS_SOON = datetime.timedelta(days=30)
"""A certificate that ends within this should be issued again."""
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""A certificate is valid from a little before it is made, so that a slow clock elsewhere accepts it."""


class Role(enum.Enum):
    """What the holder of a certificate is."""

    MASTER = "master"
    WORKER = "worker"
    OPERATOR = "operator"
    """A person who may change the cluster."""
    READER = "reader"
    """A person or program that may look."""
    SERVICE = "service"
    """A program that uses the state and submits work."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate says its holder is."""

    cluster: str
    role: Role
    id: str

    @property
    def uri(self) -> str:
        """The name in the certificate."""
        return f"{SCHEME}://{quote(self.cluster, safe='')}/{self.role.value}/{quote(self.id, safe='')}"


def parse_identity(uri: str) -> Identity | None:
    """The identity in a certificate's URI; None when it is none of ours."""
    try:
        parts = urlsplit(uri)
        _, role, identifier = parts.path.split("/")
        identity = Identity(unquote(parts.netloc), Role(role), unquote(identifier))
    except ValueError:
        return None
    # Only the one spelling counts, so that nobody can be written in two ways.
    return identity if identity.uri == uri and identity.cluster and identity.id else None


_PLAIN_LABEL = re.compile(r"(?!h-)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _dns_label(text: str) -> str:
    # A host label has at most 63 characters, no '_' and '.', and no capitals that count. What is none is hashed, so
    # that distinct names stay distinct.
    return text if _PLAIN_LABEL.fullmatch(text) else "h-" + hashlib.sha256(text.encode()).hexdigest()[:40]


def role_dns_name(cluster: str, role: Role) -> str:
    """The DNS name that every server certificate of a role carries."""
    return f"{role.value}.{_dns_label(cluster)}.{SCHEME}"


def id_dns_name(identity: Identity) -> str:
    """The DNS name that only one daemon's server certificate carries."""
    return f"{_dns_label(identity.id)}.{role_dns_name(identity.cluster, identity.role)}"


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where one party keeps its certificates."""

    authority: Path
    certificate: Path
    key: Path


def leaf_files(directory: Path, role: Role, identifier: str) -> CertificateFiles:
    """The files of one leaf in a directory of certificates."""
    name = f"{role.value}-{identifier}"
    return CertificateFiles(authority_files(directory)[0], directory / f"{name}.crt", directory / f"{name}.key")


def authority_files(directory: Path) -> tuple[Path, Path]:
    """Certificate and key of the authority of a directory."""
    return directory / f"{AUTHORITY_NAME}.crt", directory / f"{AUTHORITY_NAME}.key"


def create_authority(directory: Path, cluster: str, now: datetime.datetime) -> Path:
    """Makes the authority's key and certificate; refuses when there is one. Returns the certificate's path."""
    _check_name("cluster", cluster)
    certificate_path, key_path = authority_files(directory)
    if certificate_path.exists() or key_path.exists():
        raise InvalidRequest(f"there is an authority in {directory} already; use another directory, or use this one")
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} authority"[:64])])
    builder = _builder(name, name, key.public_key(), now, now + datetime.timedelta(days=AUTHORITY_DAYS))
    usage = _key_usage(signs_certificates=True)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_cluster_uri(cluster))]), False)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return certificate_path


def issue(
    directory: Path, identity: Identity, now: datetime.datetime, days: int = LEAF_DAYS, to: Path | None = None
) -> CertificateFiles:
    """Makes a leaf certificate, signed by the authority in `directory`; replaces an earlier one of that identity.

    It is written beside the authority's, or `to` another directory, with the authority's certificate. It ends with the
    authority at the latest. Raises InvalidRequest for a name that cannot be, ConfigError when the authority is not
    at hand or is another cluster's.
    """
    _check_name("id", identity.id)
    authority, authority_key = _load_authority(directory)
    ends = authority.not_valid_after_utc
    if _authority_cluster(authority) != identity.cluster:
        path, signs_for = authority_files(directory)[0], _authority_cluster(authority)
        raise ConfigError([f"{path}: is of cluster {signs_for!r}, not of {identity.cluster!r}; use its own authority"])
    if ends <= now:
        path = authority_files(directory)[0]
        raise ConfigError([f"{path}: ended on {ends:%Y-%m-%d}; make another authority, and all certificates anew"])
    until = min(now + datetime.timedelta(days=days), ends)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.role.value} {identity.id}"[:64])])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.role in (Role.MASTER, Role.WORKER):
        names += [x509.DNSName(id_dns_name(identity)), x509.DNSName(role_dns_name(identity.cluster, identity.role))]
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(subject, authority.subject, key.public_key(), now, until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    target = to or directory
    target.mkdir(parents=True, exist_ok=True)
    files = leaf_files(target, identity.role, identity.id)
    if target.resolve() != directory.resolve():
        _write(files.authority, authority.public_bytes(serialization.Encoding.PEM), 0o644)
    _write_key(files.key, key)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return files


def authority_cluster(directory: Path) -> str:
    """The cluster that the authority in a directory is for. Raises ConfigError when there is no such authority."""
    path = authority_files(directory)[0]
    if not path.exists():
        raise ConfigError([f"{path}: there is no authority here; make one with `clusterctl certs init`"])
    return _authority_cluster(_load_certificate(path))


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """What `clusterctl certs show` tells of a certificate."""

    identity: Identity | None
    """None for an authority, and for a certificate that is none of ours."""
    cluster: str
    """Empty for a certificate that is none of ours."""
    subject: str
    issuer: str
    valid_from: datetime.datetime
    valid_until: datetime.datetime
    fingerprint_sha256: str
    is_authority: bool

    def ends_soon(self, now: datetime.datetime) -> bool:
        """True when it should be issued again."""
        return self.valid_until - now < ENDS_SOON


def describe(path: Path) -> CertificateInfo:
    """What a certificate file says. Raises ConfigError when it is none."""
    certificate = _load_certificate(path)
    identity = certificate_identity(certificate)
    return CertificateInfo(
        identity=identity,
        cluster=identity.cluster if identity is not None else _authority_cluster(certificate),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
        fingerprint_sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        is_authority=_is_authority(certificate),
    )


def certificate_identity(certificate: x509.Certificate) -> Identity | None:
    """Who a certificate says its holder is; None when it does not say."""
    identities = [identity for uri in _uris(certificate) if (identity := parse_identity(uri)) is not None]
    # Two identities in one certificate would let its holder choose; that is none.
    return identities[0] if len(identities) == 1 else None


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _cluster_uri(cluster: str) -> str:
    return f"{SCHEME}://{quote(cluster, safe='')}"


def _authority_cluster(certificate: x509.Certificate) -> str:
    """The cluster that an authority signs for; empty for another certificate."""
    prefix = f"{SCHEME}://"
    clusters = [unquote(uri.removeprefix(prefix)) for uri in _uris(certificate) if uri.startswith(prefix)]
    return clusters[0] if len(clusters) == 1 and _is_authority(certificate) else ""


def _check_name(what: str, value: str) -> None:
    # It becomes a file's name too.
    if advice := check_id(value):
        raise InvalidRequest(f"{value!r} cannot be the {what} of a certificate; {advice}")


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(until)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such certificate; make it with `clusterctl certs issue`"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"{path}: not a certificate in PEM form"]) from None


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = authority_files(directory)
    if not certificate_path.exists():
        raise ConfigError([f"{certificate_path}: there is no authority here; make one with `clusterctl certs init`"])
    certificate = _load_certificate(certificate_path)
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except FileNotFoundError:
        raise ConfigError([f"{key_path}: no such key; issue certificates where the authority was made"]) from None
    except OSError as error:
        raise ConfigError([f"{key_path}: cannot be read: {error.strerror}"]) from None
    except (TypeError, ValueError):  # TypeError: it has a password.
        raise ConfigError([f"{key_path}: not a private key in PEM form"]) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError([f"{key_path}: not a key of the kind that `clusterctl certs init` makes"])
    if key.public_key() != certificate.public_key():
        raise ConfigError([f"{key_path}: is not the key of {certificate_path}; bring the two that belong together"])
    return certificate, key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, data, 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Writes a file that never has a wider mode than `mode`, not even for a moment; replaces it whole."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
