"""The detokenizer's own rules: what is asked in which order, counted, recorded and wiped."""

from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

import orjson
import pytest
from structlog.testing import capture_logs

from glamd.crypto.aead import Sealer
from glamd.db import Database
from glamd.errors import (
    CryptoError,
    ForbiddenError,
    GlamError,
    GoneError,
    InternalError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from glamd.keys.keyrings import DataKey, Keyring
from glamd.payments.audit_chain import AuditEntry
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.detokenize import DAMAGED, Detokenizer
from glamd.payments.model import SENSITIVE_FIELDS, Grant, Look, SealedToken
from tests.support.kept_audit import KeptAudit
from tests.support.settable_clock import SettableClock

MERCHANT = UUID("6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c")
TOKEN = "ptk_" + "0" * 26
PAN = "4242424242424242"
CARD = {"pan": PAN, "expiry": "4912", "cardholder_name": None}
LOOK = Look(
    worker="settler",
    certificate_sha256="ab" * 32,
    ip="192.0.2.7",
    token=TOKEN,
    fields=("pan", "cardholder_name", "service_code"),
    purpose="settlement",
    correlation_id="order-7",
)
GRANT = Grant(
    worker="settler",
    purposes=frozenset({"settlement"}),
    fields=frozenset({"pan", "expiry", "cardholder_name", "service_code"}),
    merchants=frozenset(),
    rate_per_s=2.0,
)


class WatchedSealer(Sealer):
    """Remembers the buffers that it gave out."""

    def __init__(self) -> None:
        super().__init__(bytes(32))
        self.opened: list[bytearray] = []

    def open_sealed(self, sealed: bytes, *, associated_data: bytes) -> bytearray:
        """The real thing, remembered."""
        clear = super().open_sealed(sealed, associated_data=associated_data)
        self.opened.append(clear)
        return clear


class OneKey(Keyring[DataKey]):
    """Has every version that is not destroyed, or fails as it is told to."""

    def __init__(self, sealer: Sealer) -> None:
        self.fails: Exception | None = None
        self.destroyed: set[str] = set()
        self._sealer = sealer

    async def version(self, version: str) -> DataKey:
        """The key."""
        if self.fails is not None:
            raise self.fails
        if version in self.destroyed:
            raise CryptoError(f"version {version} of the key payment-tokens is destroyed")
        return DataKey(version, self._sealer, "000000")


StoredRow = tuple[UUID, str, datetime, bytes, bytes | None, str]


class OneToken(Database):
    """Has one row, or none, and counts how often it was asked."""

    def __init__(self) -> None:
        self.row: StoredRow | None = None
        self.then: StoredRow | None = None
        """What the row is from the second look on."""
        self.asked = 0

    async def find(self, token: str) -> SealedToken | None:
        """The row of the token asked for."""
        self.asked += 1
        if self.asked > 1 and self.then is not None:
            self.row = self.then
        return SealedToken(*self.row) if self.row is not None and token == TOKEN else None


class Stage:
    """A detokenizer with everything around it in the test's hands."""

    def __init__(self, grant: Grant = GRANT) -> None:
        self.clock = SettableClock()
        self.sealer = WatchedSealer()
        self.keyring = OneKey(self.sealer)
        self.database = OneToken()
        self.audit = KeptAudit()
        self.detokenizer = Detokenizer(
            self.database,
            find=self.database.find,
            audit=self.audit,
            keyring=self.keyring,
            grants=[grant],
            clock=self.clock,
        )
        self.keep(orjson.dumps(CARD))

    def keep(self, packed: bytes, *, status: str = "active", ttl_s: float = 60.0) -> None:
        """Store the token with this sealed in it."""
        sealed = self.sealer.seal(packed, associated_data=associated_data(TOKEN, "v1"))
        expires_at = self.clock.now() + timedelta(seconds=ttl_s)
        self.database.row = (MERCHANT, status, expires_at, sealed, None, "v1")

    def keep_sensitive(self, packed: bytes) -> None:
        """Store this as the token's sensitive data."""
        assert self.database.row is not None
        sealed = self.sealer.seal(packed, associated_data=sensitive_associated_data(TOKEN, "v1"))
        self.database.row = (*self.database.row[:4], sealed, "v1")

    async def refused(self, look: Look = LOOK, *, audited: str | None = None) -> GlamError:
        """The error of a look that must not succeed, with its row as the last one."""
        before = len(self.audit.entries)
        with pytest.raises(GlamError) as caught:
            await self.detokenizer.decrypt(look)
        assert self.audit.outcomes[before:] == [audited or caught.value.code]
        return caught.value


@pytest.fixture
def stage() -> Stage:
    """Everything in order: a token, its key, a grant."""
    return Stage()


async def test_without_a_row_there_is_no_answer_and_no_refusal_either(stage: Stage) -> None:
    stage.audit.fails = True
    with pytest.raises(UnavailableError):
        await stage.detokenizer.decrypt(LOOK)
    with pytest.raises(UnavailableError):
        await stage.detokenizer.decrypt(replace(LOOK, purpose="curiosity"))


@pytest.mark.parametrize(
    "look",
    [
        replace(LOOK, worker="other"),
        replace(LOOK, purpose="refund"),
        replace(LOOK, fields=("pan", "emv")),
    ],
    ids=["worker", "purpose", "field"],
)
async def test_outside_the_grant_not_even_the_database_is_asked(stage: Stage, look: Look) -> None:
    assert isinstance(await stage.refused(look), ForbiddenError)
    assert stage.database.asked == 0


async def test_a_foreign_merchants_token_is_not_even_opened() -> None:
    stage = Stage(replace(GRANT, merchants=frozenset({UUID(int=1)})))
    assert isinstance(await stage.refused(), ForbiddenError)
    assert stage.sealer.opened == []


async def test_a_token_is_open_until_its_last_moment_and_not_in_it(stage: Stage) -> None:
    stage.clock.advance(59.999)
    assert (await stage.detokenizer.decrypt(LOOK))["pan"] == PAN
    stage.clock.advance(0.001)
    error = await stage.refused()
    assert isinstance(error, GoneError)
    assert error.code == "TOKEN_EXPIRED"


async def test_a_revoked_token_is_revoked_also_when_it_has_expired(stage: Stage) -> None:
    stage.keep(b"", status="revoked", ttl_s=-1)
    assert (await stage.refused()).code == "TOKEN_REVOKED"


async def test_a_rate_is_spent_by_every_look_inside_the_grant_and_earned_back_in_time(
    stage: Stage,
) -> None:
    await stage.refused(replace(LOOK, purpose="curiosity"))
    assert isinstance(await stage.refused(replace(LOOK, token="ptk_other")), NotFoundError)
    await stage.detokenizer.decrypt(LOOK)
    error = await stage.refused()
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == 1
    stage.clock.advance(0.4)
    assert isinstance(await stage.refused(), RateLimitedError)
    stage.clock.advance(0.1)
    await stage.detokenizer.decrypt(LOOK)
    # However long it was quiet, it may use one second's worth at once.
    stage.clock.advance(3600)
    stage.keep(orjson.dumps(CARD))
    for _ in range(2):
        await stage.detokenizer.decrypt(LOOK)
    assert isinstance(await stage.refused(), RateLimitedError)


@pytest.mark.parametrize("rate_per_s", [0.001, 0.3, 0.999])
async def test_a_worker_that_comes_again_when_it_is_told_to_is_served(rate_per_s: float) -> None:
    stage = Stage(replace(GRANT, rate_per_s=rate_per_s))
    stage.keep(orjson.dumps(CARD), ttl_s=1e6)
    await stage.detokenizer.decrypt(LOOK)
    error = await stage.refused()
    assert isinstance(error, RateLimitedError)
    stage.clock.advance(error.retry_after_s - 1)
    error = await stage.refused()
    assert isinstance(error, RateLimitedError)
    stage.clock.advance(error.retry_after_s)
    await stage.detokenizer.decrypt(LOOK)


@pytest.mark.parametrize("packed", [b"", b"\xff" + PAN.encode(), b'"' + PAN.encode() + b'"', b"["])
async def test_what_was_sealed_and_is_no_card_is_our_fault_recorded_and_shown_to_nobody(
    stage: Stage, packed: bytes
) -> None:
    stage.keep(packed)
    error: BaseException | None = await stage.refused(audited=DAMAGED)
    assert isinstance(error, InternalError)
    assert error.code == "INTERNAL_ERROR"
    while error is not None:
        assert PAN not in repr(error)
        assert PAN not in str(vars(error))
        error = error.__cause__ or error.__context__
    assert all(set(buffer) <= {0} for buffer in stage.sealer.opened)


async def test_another_tokens_ciphertext_does_not_open(stage: Stage) -> None:
    assert stage.database.row is not None
    foreign = stage.sealer.seal(orjson.dumps(CARD), associated_data=associated_data("ptk_x", "v1"))
    stage.database.row = (*stage.database.row[:3], foreign, None, "v1")
    with capture_logs() as logs:
        assert isinstance(await stage.refused(audited=DAMAGED), InternalError)
    assert [(line["event"], line["token"]) for line in logs] == [("token_damaged", TOKEN)]


async def test_a_key_version_that_is_gone_is_recorded_as_that(stage: Stage) -> None:
    stage.keyring.fails = CryptoError("version v1 of the key payment-tokens is destroyed")
    assert (await stage.refused()).code == "CRYPTO_ERROR"


async def test_a_token_that_was_re_encrypted_while_it_was_read_is_read_once_more(
    stage: Stage,
) -> None:
    assert stage.database.row is not None
    sealed = stage.sealer.seal(orjson.dumps(CARD), associated_data=associated_data(TOKEN, "v2"))
    stage.database.then = (*stage.database.row[:3], sealed, None, "v2")
    stage.keyring.destroyed = {"v1"}
    assert (await stage.detokenizer.decrypt(LOOK))["pan"] == PAN
    assert stage.database.asked == 2


async def test_a_token_that_ended_while_its_key_was_destroyed_has_ended(stage: Stage) -> None:
    assert stage.database.row is not None
    stage.database.then = (MERCHANT, "revoked", stage.database.row[2], b"", None, "")
    stage.keyring.destroyed = {"v1"}
    assert (await stage.refused()).code == "TOKEN_REVOKED"


# ---- sensitive authentication data

SENSITIVE = {"track2": ";4242424242424242=4912?", "emv": "9F2608AABBCCDD"}
EVERYTHING = replace(GRANT, fields=GRANT.fields | SENSITIVE_FIELDS)
SENSITIVE_LOOK = replace(LOOK, fields=("track2", "emv"))


async def test_the_two_ciphertexts_of_a_token_do_not_stand_in_for_each_other() -> None:
    stage = Stage(EVERYTHING)
    assert stage.database.row is not None
    card = stage.database.row[3]
    stage.keep_sensitive(orjson.dumps(SENSITIVE))
    sensitive = stage.database.row[4]
    assert sensitive is not None
    stage.database.row = (*stage.database.row[:3], sensitive, card, "v1")
    assert isinstance(await stage.refused(audited=DAMAGED), InternalError)
    assert isinstance(await stage.refused(SENSITIVE_LOOK, audited=DAMAGED), InternalError)


async def test_sensitive_data_that_is_not_there_is_null_and_opens_nothing() -> None:
    stage = Stage(EVERYTHING)
    assert await stage.detokenizer.decrypt(SENSITIVE_LOOK) == {"track2": None, "emv": None}
    assert stage.sealer.opened == []


async def test_only_the_ciphertexts_that_were_asked_for_are_opened_and_wiped() -> None:
    stage = Stage(EVERYTHING)
    stage.keep_sensitive(orjson.dumps({"track2": SENSITIVE["track2"], "emv": None}))
    assert await stage.detokenizer.decrypt(SENSITIVE_LOOK) == {
        "track2": SENSITIVE["track2"],
        "emv": None,
    }
    assert len(stage.sealer.opened) == 1
    both = replace(LOOK, fields=("emv", "pan"))
    assert await stage.detokenizer.decrypt(both) == {"emv": None, "pan": PAN}
    assert all(set(buffer) <= {0} for buffer in stage.sealer.opened)


# ---- grants that change while it runs


async def test_a_grant_that_is_taken_away_holds_for_the_next_look(stage: Stage) -> None:
    await stage.detokenizer.decrypt(LOOK)
    stage.detokenizer.replace_grants([replace(GRANT, purposes=frozenset({"refund"}))])
    assert isinstance(await stage.refused(), ForbiddenError)
    stage.detokenizer.replace_grants([])
    assert isinstance(await stage.refused(replace(LOOK, purpose="refund")), ForbiddenError)
    assert stage.detokenizer.grants == ()


async def test_new_grants_give_nobody_his_rate_anew(stage: Stage) -> None:
    for _ in range(2):
        await stage.detokenizer.decrypt(LOOK)
    stage.detokenizer.replace_grants([replace(GRANT, rate_per_s=2.0)])
    assert isinstance(await stage.refused(), RateLimitedError)
    stage.clock.advance(0.5)
    await stage.detokenizer.decrypt(LOOK)


async def test_a_failure_that_nobody_foresaw_is_an_attempt_all_the_same(stage: Stage) -> None:
    stage.keyring.fails = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await stage.detokenizer.decrypt(LOOK)
    assert stage.audit.outcomes == ["INTERNAL_ERROR"]


async def test_a_good_look_says_what_is_not_there_records_itself_and_leaves_no_clear_buffer(
    stage: Stage,
) -> None:
    assert await stage.detokenizer.decrypt(LOOK) == {
        "pan": PAN,
        "cardholder_name": None,
        "service_code": None,
    }
    assert stage.audit.entries == [
        AuditEntry(
            action="decrypt",
            actor="settler",
            certificate_sha256="ab" * 32,
            ip="192.0.2.7",
            subject=TOKEN,
            fields=LOOK.fields,
            purpose="settlement",
            outcome="ok",
            correlation_id="order-7",
        )
    ]
    (buffer,) = stage.sealer.opened
    assert set(buffer) == {0}
