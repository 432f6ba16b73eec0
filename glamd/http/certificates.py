"""Client certificates: whose they are, worker's or device's, and who that is.

TLS has verified the certificate before a byte of HTTP is read, against the authorities of both.
Here it is asked which of them has signed it, by the signature: two authorities may have one name.
So a device is never a worker, whatever names it has, nor a worker a device. What either may do is
the routes' to say; whether a device is still wanted, the registry's.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Literal

import structlog
from aiohttp import web
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from glamd.clock import Clock
from glamd.errors import ForbiddenError, GlamError, UnauthenticatedError
from glamd.http.auth_metrics import OUTCOMES
from glamd.http.connections import GuardedHandler
from glamd.http.identity import Device, Identity, Worker
from glamd.http.tls import WorkerTls

Reason = Literal["authority", "certificate_name", "certificate_dates", "trust_domain", "no_worker"]
"""Why a certificate is not believed; a label of `glamd_http_auth_total`."""

DEVICE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

log = structlog.get_logger()


class CertificateIdentity:
    """Recognises workers by the URI `spiffe://<trust-domain>/worker/<name>`, devices by the CN."""

    def __init__(self, trust_domain: str, clock: Clock) -> None:
        self._clock = clock
        domain = re.escape(trust_domain)
        self._worker = re.compile(rf"spiffe://{domain}/worker/([A-Za-z0-9][A-Za-z0-9._-]{{0,63}})")
        self._ours = f"spiffe://{trust_domain}/"
        self._workers: Sequence[x509.Certificate] = ()
        self._devices: Sequence[x509.Certificate] = ()

    def trust(self, tls: WorkerTls) -> None:
        """Believe these authorities and no others, of whoever is asked from now on who they are."""
        self._workers, self._devices = tls.workers, tls.devices

    async def __call__(self, request: web.BaseRequest) -> Identity:
        """The worker or the device.

        Raises `UnauthenticatedError` where the certificate names nobody of ours, `ForbiddenError`
        where a worker's authority has certified somebody who is no worker.
        """
        handler = request.protocol
        assert isinstance(handler, GuardedHandler)
        # A certificate holds for as long as its connection.
        if handler.identity is None:
            handler.identity = self._recognise(request)
            OUTCOMES.count(handler.identity.kind, "verified")
        else:
            OUTCOMES.cached[handler.identity.kind] += 1
        return handler.identity

    def _recognise(self, request: web.BaseRequest) -> Identity:
        der = presented(request)
        if der is None:
            raise UnauthenticatedError("The connection is not, or no longer, one of TLS.")
        try:
            leaf = x509.load_der_x509_certificate(der)
            names = _uris(leaf), _common_names(leaf)
        except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension):
            raise _refused("certificate_name", "The client certificate cannot be read.") from None
        if _resumed(request) and not self._is_valid_now(leaf):
            raise _refused("certificate_dates", "The client certificate is not valid now.")
        is_device, is_worker = _signed(leaf, self._devices), _signed(leaf, self._workers)
        if is_device == is_worker:
            raise _refused("authority", "The client certificate is of none of the authorities.")
        fingerprint = hashlib.sha256(der).hexdigest()
        uris, common_names = names
        if is_device:
            return _device(common_names, fingerprint)
        return self._worker_of(uris, fingerprint)

    def _is_valid_now(self, leaf: x509.Certificate) -> bool:
        return leaf.not_valid_before_utc <= self._clock.now() <= leaf.not_valid_after_utc

    def _worker_of(self, uris: Sequence[str], fingerprint: str) -> Worker:
        if len(uris) != 1:
            raise _refused("certificate_name", "The client certificate needs exactly one URI name.")
        worker = self._worker.fullmatch(uris[0])
        if worker is not None:
            return Worker(name=worker[1], certificate_sha256=fingerprint)
        if uris[0].startswith(self._ours):
            OUTCOMES.count("unknown", "no_worker")
            raise ForbiddenError("The client certificate is no worker's.")
        raise _refused("trust_domain", "The client certificate is of another trust domain.")


def presented(request: web.BaseRequest) -> bytes | None:
    """The client's certificate as DER; None where the connection has none, or is gone."""
    transport = request.transport
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    der: bytes | None = None if tls is None else tls.getpeercert(binary_form=True)
    return der


def _resumed(request: web.BaseRequest) -> bool:
    """Whether the session is an earlier one gone on with, whose certificate TLS did not look at.

    `ssl` has no way to turn that off for TLS 1.2, where the session stays with the server.
    """
    transport = request.transport
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    return tls is not None and bool(tls.session_reused)


def _device(common_names: Sequence[str], fingerprint: str) -> Device:
    if len(common_names) != 1 or not DEVICE_ID.fullmatch(common_names[0]):
        raise _refused("certificate_name", "The client certificate's CN is no device id.")
    return Device(name=common_names[0], certificate_sha256=fingerprint)


def _signed(leaf: x509.Certificate, authorities: Sequence[x509.Certificate]) -> bool:
    """Whether one of these has signed the certificate itself, with no other in between."""
    for authority in authorities:
        try:
            leaf.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        return True
    return False


def _uris(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.UniformResourceIdentifier)


def _common_names(leaf: x509.Certificate) -> list[str]:
    found = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return [each.value for each in found if isinstance(each.value, str)]


def _refused(reason: Reason, message: str) -> GlamError:
    OUTCOMES.count("unknown", reason)
    log.info("certificate_refused", reason=reason)
    return UnauthenticatedError(message)
