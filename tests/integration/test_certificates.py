"""The development certificates: real TLS with them, whose they are, and when they are renewed."""

import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from glamd.embedded import certificates
from glamd.embedded.certificates import DevelopmentCertificates, KeyPair

TODAY = datetime.now(UTC)
WORKER = "spiffe://glamd/worker/settler"


class SetClock:
    """A clock that a test sets."""

    def __init__(self, now: datetime = TODAY) -> None:
        self.today = now

    def now(self) -> datetime:
        """The time that was set."""
        return self.today

    def monotonic_s(self) -> float:
        """Not asked for here."""
        return 0.0


def context_of(own: KeyPair, *, trusts: KeyPair, server: bool) -> ssl.SSLContext:
    """Mutual TLS with one's own certificate, trusting one authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(own.certificate_file, own.key_file)
    context.load_verify_locations(trusts.certificate_file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def common_name_seen(own: KeyPair, *, by: DevelopmentCertificates, trusting: KeyPair) -> str:
    """Shake hands with a server that trusts one authority's clients; whom it saw, or SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context_of(by.server(), trusts=trusting, server=True).wrap_bio(
        to_server, to_client, server_side=True
    )
    client = context_of(own, trusts=by.server_ca, server=False).wrap_bio(
        to_client, to_server, server_hostname="localhost"
    )
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    certificate = server.getpeercert()
    assert certificate is not None
    subject = certificate["subject"]
    assert isinstance(subject, tuple)
    return str(subject[0][0][1])


def test_a_workers_certificate_is_none_of_a_device_and_the_reverse(tmp_path: Path) -> None:
    made = DevelopmentCertificates(tmp_path, SetClock())
    with pytest.raises(ssl.SSLError):
        common_name_seen(made.worker(WORKER), by=made, trusting=made.device_ca)
    with pytest.raises(ssl.SSLError):
        common_name_seen(made.device("dev_1"), by=made, trusting=made.worker_ca)


def test_a_certificate_of_another_installation_is_refused(tmp_path: Path) -> None:
    made = DevelopmentCertificates(tmp_path / "ours", SetClock())
    foreign = DevelopmentCertificates(tmp_path / "theirs", SetClock())
    with pytest.raises(ssl.SSLError):
        common_name_seen(foreign.device("dev_1"), by=made, trusting=made.device_ca)


def test_devices_and_workers_are_known_by_their_certificates(tmp_path: Path) -> None:
    made = DevelopmentCertificates(tmp_path, SetClock())
    device = common_name_seen(made.device("dev_1"), by=made, trusting=made.device_ca)
    worker = common_name_seen(made.worker(WORKER), by=made, trusting=made.worker_ca)
    assert (device, worker) == ("dev_1", "settler")


def test_a_second_start_finds_what_the_first_made(tmp_path: Path) -> None:
    first = DevelopmentCertificates(tmp_path, SetClock())
    made = [first.server(), first.worker(WORKER), first.device("dev_1"), first.device_ca]
    second = DevelopmentCertificates(tmp_path, SetClock())
    again = [second.server(), second.worker(WORKER), second.device("dev_1"), second.device_ca]
    assert [pair.certificate for pair in made] == [pair.certificate for pair in again]


def test_keys_are_readable_by_their_owner_only_and_never_shown(tmp_path: Path) -> None:
    made = DevelopmentCertificates(tmp_path, SetClock())
    pairs = [made.server(), made.worker(WORKER), made.server_ca, made.device_ca, made.worker_ca]
    for pair in pairs:
        assert pair.key_file.stat().st_mode & 0o777 == 0o600
        assert "key=" not in repr(pair)
    assert pairs[0].key_file.parent.stat().st_mode & 0o777 == 0o700


def test_a_certificate_is_renewed_before_it_ends_and_its_authority_stays(tmp_path: Path) -> None:
    clock = SetClock()
    made = DevelopmentCertificates(tmp_path, clock)
    first = made.server().certificate
    clock.today = first.not_valid_after_utc - certificates.LEAF_RENEWAL - timedelta(seconds=1)
    assert made.server().certificate == first
    clock.today += timedelta(seconds=2)
    renewed = made.server().certificate
    assert renewed.not_valid_after_utc > first.not_valid_after_utc
    renewed.verify_directly_issued_by(made.server_ca.certificate)
    again = DevelopmentCertificates(tmp_path, clock)
    assert again.server_ca.certificate == made.server_ca.certificate


def test_an_authority_that_nears_its_end_is_renewed_with_what_it_issued(tmp_path: Path) -> None:
    clock = SetClock()
    old = DevelopmentCertificates(tmp_path, clock)
    clock.today += certificates.AUTHORITY_VALIDITY - certificates.AUTHORITY_RENEWAL
    old.device("dev_1")
    new = DevelopmentCertificates(tmp_path, clock)
    assert new.device_ca.certificate != old.device_ca.certificate
    new.device("dev_1").certificate.verify_directly_issued_by(new.device_ca.certificate)


@pytest.mark.parametrize("damage", ["", "-----BEGIN GARBAGE-----\n"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    made = DevelopmentCertificates(tmp_path, SetClock())
    made.server().key_file.write_text(damage)
    mended = made.server()
    assert mended.key.public_key() == mended.certificate.public_key()


def test_a_key_whose_certificate_was_not_written_yet_is_made_anew(tmp_path: Path) -> None:
    made = DevelopmentCertificates(tmp_path, SetClock())
    server = made.server()
    server.key_file.write_bytes(made.worker(WORKER).key_file.read_bytes())
    mended = made.server()
    assert mended.key.public_key() == mended.certificate.public_key()
