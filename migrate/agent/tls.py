"""Mutual TLS between agents and their callers: credentials from a directory, and a private authority for trying out.

A directory holds what one host needs, all PEM:

=============  ====================================================================================================
``ca.crt``     the authority that both sides trust; several certificates while one replaces the other
``agent.crt``  the agent's certificate, for serving and for calling other agents: DNS and IP names it is called by, and
               ``URI:tcpmig://agent/NAME``
``agent.key``  its private key
``client.crt`` a person's or a controller's: ``URI:tcpmig://operator/NAME`` or ``URI:tcpmig://viewer/NAME``
``client.key`` its private key
``ca.key``     the authority's private key; only where certificates are made, never needed by an agent
=============  ====================================================================================================

What a name may do stands in migrate/agent/auth.py. A certificate that was replaced on disk is used from the next
handshake on; connections that stand go on.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate import errors
from migrate.agent.auth import Role, uri_of
from migrate.agent.logging import get_logger

__all__ = ["Identity", "expiry", "init_tls", "issue", "load_channel_credentials", "load_server_credentials"]

Identity = Literal["agent", "client"]

_AUTHORITY_DAYS = 3650
_CERTIFICATE_DAYS = 397  # what browsers allow; long enough to try out, short enough to make people automate it
_SKEW = datetime.timedelta(hours=1)  # two hosts' clocks may differ by this much

_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.IGNORECASE)

_Key = ec.EllipticCurvePrivateKey

_log = get_logger(__name__)


def init_tls(directory: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Make a private authority, a certificate for the agents called by ``names`` and one for an operator.

    ``names`` are DNS names and IP addresses, the first also names the agent. Keys are ECDSA P-256, their files 0600,
    the directory 0700. Raises UsageError if one of the files exists already: nothing is overwritten.
    """
    if not names:
        raise errors.UsageError("an agent's certificate needs at least one name", hint="give the names it is called by")
    where = Path(directory)
    files = [where / f"{stem}.{kind}" for stem in ("ca", "agent", "client") for kind in ("key", "crt")]
    for name in names:
        _host_name(name)
    for path in files:
        if path.exists():
            raise errors.UsageError(f"{path} exists already", hint="choose another directory, or remove it first")
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise errors.from_oserror(f"mkdir {where}", error, hint="choose a directory you may write to") from None
    key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities of the same name in one ca.crt would be taken for each other.
    subject = _name(f"tcpmig private authority {os.urandom(4).hex()}")
    authority = (
        _builder(subject, subject, key, key, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(where / "ca.key", _key_pem(key))
    _write(where / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    issue(where, "agent", Role.AGENT, names[0], hosts=names)
    issue(where, "client", Role.OPERATOR, "operator")


def issue(
    directory: str | os.PathLike[str],
    identity: Identity,
    role: Role,
    name: str,
    *,
    hosts: Sequence[str] = (),
    days: float = _CERTIFICATE_DAYS,
) -> None:
    """Make ``identity``.crt and ``identity``.key, signed by the authority in ``directory``, replacing them atomically.

    The certificate bears ``tcpmig://ROLE/NAME`` and, for an agent, the DNS names and IP addresses in ``hosts``.
    ``days`` is its lifetime. Raises NotFound without an authority.
    """
    where = Path(directory)
    authority = x509.load_pem_x509_certificate(_read(where / "ca.crt"))
    signer = serialization.load_pem_private_key(_read(where / "ca.key"), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise errors.UsageError(f"{where}/ca.key is no ECDSA key", hint="`tcpmig agent init-tls` makes one")
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.AGENT:  # nobody else may pose as an agent
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    alternatives = [x509.UniformResourceIdentifier(uri_of(role, name)), *map(_host_name, hosts)]
    certificate = (
        _builder(_name(name[:64]), authority.subject, key, signer, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write(where / f"{identity}.key", _key_pem(key))
    _write(where / f"{identity}.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise errors.UsageError(f"{host!r} is no host name and no address", hint="names in ASCII, without a port")
    return x509.DNSName(host)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def load_server_credentials(directory: str | os.PathLike[str]) -> grpc.ServerCredentials:
    """Credentials of an agent that serves: callers must show a certificate of the authority.

    Raises NotFound, UsageError (files that do not fit each other, a key that everybody can read) or HostError
    (expired). Later changes of the files are used from the next handshake on; files that are wrong then are logged, and
    the last good ones stay in use.
    """
    reload = _Reloader(Path(directory))
    # Its documentation lets the callback return None; its type stubs do not.
    fetch: Any = reload
    return grpc.dynamic_ssl_server_credentials(reload.initial, fetch, require_client_authentication=True)


def load_channel_credentials(directory: str | os.PathLike[str], identity: Identity) -> grpc.ChannelCredentials:
    """Credentials of a caller, as the agent itself or as the client in ``directory``.

    A channel keeps the certificates it was made with: make a new one for each move. Raises as load_server_credentials.
    """
    loaded = _load(Path(directory), identity)
    return grpc.ssl_channel_credentials(loaded.authority, loaded.key, loaded.certificate)


def expiry(directory: str | os.PathLike[str], identity: Identity = "agent") -> float:
    """When the certificate in ``directory`` expires, seconds since 1970; for a metric, so that somebody renews it."""
    return _load(Path(directory), identity).expiry


class _Loaded(NamedTuple):
    authority: bytes
    certificate: bytes
    key: bytes
    expiry: float


class _Reloader:
    """What gRPC calls before each handshake to learn whether the certificates changed."""

    def __init__(self, where: Path) -> None:
        self._where = where
        self._seen = self._stamp()
        self.initial = self._read()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None if nothing changed. Must not raise: gRPC would refuse the handshake."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            configuration = self._read()
        except errors.Error as error:
            _log.warning("new certificates are unusable, the old ones stay", why=str(error))
            return None
        _log.info("certificates reloaded", directory=self._where)
        return configuration

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file does; a missing file has None."""
        stamps: list[tuple[int, int, int] | None] = []
        for name in ("ca.crt", "agent.crt", "agent.key"):
            try:
                status = os.stat(self._where / name)
                stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps

    def _read(self) -> grpc.ServerCertificateConfiguration:
        loaded = _load(self._where, "agent")
        return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificate)], loaded.authority)


def _load(where: Path, identity: Identity) -> _Loaded:
    """The three files, checked here because a handshake that fails later says little about why."""
    authority, certificate, key = (_read(where / n) for n in ("ca.crt", f"{identity}.crt", f"{identity}.key"))
    now = datetime.datetime.now(datetime.UTC)
    try:
        x509.load_pem_x509_certificates(authority)
        leaf = x509.load_pem_x509_certificates(certificate)[0]
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        why = str(error).splitlines()[0]
        raise errors.UsageError(f"{where}: no usable PEM in {identity}.crt, {identity}.key or ca.crt: {why}") from None
    if leaf.public_key() != private.public_key():
        raise errors.UsageError(f"{where}/{identity}.key is not the key of {identity}.crt", hint="replace both")
    if leaf.not_valid_after_utc <= now:
        raise errors.HostError(
            f"{where}/{identity}.crt expired on {leaf.not_valid_after_utc:%Y-%m-%d}", hint="renew it"
        )
    return _Loaded(authority, certificate, key, leaf.not_valid_after_utc.timestamp())


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            if path.suffix == ".key" and os.fstat(file.fileno()).st_mode & 0o007:
                raise errors.UsageError(f"{path} is open to everybody on this host", hint=f"chmod 600 {path}")
            return file.read()
    except FileNotFoundError:
        hint = "`tcpmig agent init-tls DIR` makes certificates for trying out"
        raise errors.NotFound(f"{path} does not exist", hint=hint) from None
    except OSError as error:
        raise errors.from_oserror(f"read {path}", error, hint="may this user read it?") from None


def _builder(subject: x509.Name, issuer: x509.Name, key: _Key, signer: _Key, days: float) -> x509.CertificateBuilder:
    """What every certificate has; ``signer`` is the authority's key."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: _Key) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(path: Path, data: bytes) -> None:
    """Write aside, 0600, then rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.unlink(missing_ok=True)
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        aside.rename(path)
    except OSError as error:
        raise errors.from_oserror(f"write {path}", error, hint="is the directory yours, and is there room?") from None
