"""Readers' envelopes from an encoder that shares nothing with ours, through to the sealed card.

Two samples are the vendors' own, printed in their manuals with the test key of ANSI X9.24.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.crypto import dukpt
from glamd.crypto.aead import Sealer
from glamd.crypto.dukpt import Dukpt, Profile
from glamd.errors import InputError, InternalError
from glamd.keys.key_sets.service import GENERIC_READER, DeviceKey
from glamd.payments import card as cards
from glamd.payments import cipher, readers
from glamd.payments.cipher import CardCipher, OpenCard
from glamd.payments.model import Format, SealedCard
from glamd.payments.readers import READERS, Unwrapped, unwrap
from tests.support.card_readers import (
    BDK,
    INITIAL_KSN,
    CardReader,
    idtech_chip,
    idtech_frame,
    idtech_original,
    initial_key,
    magtek_chip,
    magtek_line,
    marked,
    tlv,
)
from tests.support.cost import steps

PAN = "4111111111111111"
OTHER = "4012888888881881"
TRACK1 = f"%B{PAN}^DOE/JANE^25122010000012345?"
TRACK2 = f";{PAN}=25122010000012345?"
CHIP_TRACK2 = bytes.fromhex(f"{PAN}D25122010000012345")
DETAILS = tlv("5F24", bytes.fromhex("251231")) + tlv("5F20", b"DOE/JANE")
CRYPTOGRAM = tlv("9F26", bytes(range(8))) + tlv("9F36", b"\x00\x01")
SEALER = Sealer(bytes(32))
TOKEN = "ptk_0"
FORMATS: tuple[Format, ...] = ("track1", "track2", "emv-tlv", "pan", "json")
AS_ON_A_STRIPE = f"{PAN}=25122010000012345"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one reader sent in one format, and what can be known of its card."""

    reader: str
    form: Format
    data: bytes
    usage: str = "data"
    name: str | None = "DOE/JANE"
    code: str | None = "201"
    track2: str | None = AS_ON_A_STRIPE

    def __repr__(self) -> str:
        return f"{self.reader} {self.form} {len(self.data)} bytes"


def samples() -> Iterable[Sample]:
    """One of each profile and format, under the device's first counter."""
    new = CardReader
    both = {"track1": TRACK1, "track2": TRACK2}
    yield Sample("generic", "track2", new().encrypt(TRACK2.encode()), name=None)
    yield Sample("generic", "track1", new().encrypt((TRACK1 + TRACK2).encode()))
    yield Sample("magtek", "track2", magtek_line(new("pin"), pan=PAN, **both), "pin")
    yield Sample("magtek", "track1", magtek_line(new(), pan=PAN, track1=TRACK1), track2=None)
    yield Sample("magtek", "track2", magtek_line(new(), pan=PAN, track2=TRACK2), name=None)
    keyed = {
        "track1": f"%M{PAN}^MANUAL ENTRY/^2512000000737000000?",
        "track2": f";{PAN}=2512000000737000?",
    }
    yield Sample(
        "magtek", "track1", magtek_line(new(), pan=PAN, **keyed), name=None, code="000", track2=None
    )
    chip = tlv("57", CHIP_TRACK2) + CRYPTOGRAM
    shown = f";{PAN[:4]}00000000{PAN[-4:]}=251200000000000000?"
    yield Sample("magtek", "emv-tlv", magtek_chip(new(), chip, masked=shown, details=DETAILS))
    yield Sample("idtech", "track2", idtech_frame(new(), pan=PAN, **both))
    yield Sample("idtech", "track1", idtech_frame(new(), pan=PAN, optional="\0", **both))
    yield Sample("idtech", "track2", idtech_frame(new(), pan=PAN, track2=TRACK2), name=None)
    yield Sample("idtech", "track2", idtech_original(new(), pan=PAN, **both))
    pan = bytes.fromhex(PAN)
    tags = idtech_chip(new(), track2=CHIP_TRACK2, pan=pan, rest=DETAILS + CRYPTOGRAM)
    yield Sample("idtech", "emv-tlv", tags)
    objects = tlv("57", CHIP_TRACK2) + tlv("5A", pan) + DETAILS + CRYPTOGRAM
    verifone = tlv("DF900F", b"FF") + tlv("DF9020", new().encrypt(objects))
    yield Sample("verifone", "emv-tlv", verifone + tlv("DF9021", INITIAL_KSN))
    encrypted = tlv("DF9020", new().encrypt((TRACK1 + TRACK2).encode()))
    yield Sample("verifone", "track1", encrypted)
    yield Sample("ingenico", "track2", new().encrypt((TRACK1 + TRACK2).encode()))
    keyed_in = new().encrypt(f"{PAN}|2512|737".encode())
    yield Sample("ingenico", "pan", keyed_in, name=None, code=None, track2=None)
    guarded = tlv("FF1F", new().encrypt(tlv("5A", pan) + tlv("57", CHIP_TRACK2)))
    yield Sample("ingenico", "emv-tlv", DETAILS + guarded + CRYPTOGRAM)
    values = tlv("57", new().encrypt(CHIP_TRACK2)) + tlv("5A", new().encrypt(pan))
    yield Sample("emv-values", "emv-tlv", DETAILS + tlv("77", values + CRYPTOGRAM))
    only_pan = tlv("5A", new().encrypt(pan)) + DETAILS + CRYPTOGRAM
    yield Sample("emv-values", "emv-tlv", only_pan, code=None, track2=None)
    wrapped = tlv("57", new().encrypt(tlv("57", CHIP_TRACK2)))
    yield Sample("emv-objects", "emv-tlv", DETAILS + wrapped + CRYPTOGRAM)


SAMPLES = tuple(samples())


class Keys:
    """A key provider that counts how often it was asked."""

    def __init__(self, reader: str, usage: str = "data", mac: str = "optional") -> None:
        profile = Profile(scheme="tdes-dukpt", data_usage=usage, mac=mac)
        self.key = DeviceKey(profile, reader, initial_key())
        self.asked: list[tuple[str, bytes]] = []

    async def initial_key(self, key_set: str, ksn: bytes) -> DeviceKey:
        self.asked.append((key_set, ksn))
        return self.key._replace(key=dukpt.initial_key("tdes-dukpt", BDK, ksn))


def actor(keys: Keys) -> CardCipher:
    return CardCipher(
        initial_key=keys.initial_key,
        active_key=lambda: ("v1", SEALER),
        fingerprint_key=bytes(32),
    )


def message(
    sample: Sample,
    *,
    data: bytes | None = None,
    mac: bytes | None = None,
    keep: bool = False,
    ksn: bytes = INITIAL_KSN,
) -> OpenCard:
    return OpenCard(
        key_set="set",
        initial_ksn=ksn,
        counter=1,
        data=sample.data if data is None else data,
        mac=mac,
        format=sample.form,
        token=TOKEN,
        merchant_id=UUID(int=1),
        keep_sensitive=keep,
    )


async def sealed(sample: Sample, *, data: bytes | None = None, keep: bool = False) -> SealedCard:
    found = actor(Keys(sample.reader, sample.usage))
    return await found.receive(message(sample, data=data, keep=keep))


def opened(card: SealedCard) -> dict[str, str | None]:
    place = cipher.associated_data(TOKEN, "v1")
    content: dict[str, str | None] = orjson.loads(
        SEALER.open_sealed(card.ciphertext, associated_data=place)
    )
    return content


def attempt(reader: str, form: Format, data: bytes) -> Unwrapped | InputError:
    try:
        return unwrap(READERS[reader], form, data)
    except InputError as error:
        return error


# ---- refusals


@pytest.mark.parametrize("reader", sorted(READERS))
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=30)
@given(data=st.binary(max_size=120))
def test_hostile_bytes_in_any_envelope_are_refused_and_nothing_else(
    reader: str, form: Format, data: bytes
) -> None:
    found = attempt(reader, form, data)
    if isinstance(found, InputError):
        assert found.code == "DECRYPT_FAILED"
    else:
        assert 0 < len(found.ciphertexts) <= 3


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.booleans())
async def test_a_changed_byte_gives_this_card_or_a_refusal_and_never_another_card(
    sample: Sample, at: int, byte: int, cut: bool
) -> None:
    at %= len(sample.data)
    data = bytearray(sample.data)
    if cut:
        del data[at]
    else:
        data[at] = byte
    try:
        card: SealedCard | InputError = await sealed(sample, data=bytes(data))
    except InputError as error:
        card = error
    if isinstance(card, InputError):
        assert card.code == "DECRYPT_FAILED"
    else:
        assert opened(card)["pan"] == PAN


@pytest.mark.parametrize(
    "data",
    [
        b"|" * 16_384,
        b"5" * 16_384,
        b";" + b"4" * 16_000,
        b"%B411111111111" * 1100 + b"|||",
        b"\x02\xfa\x3f" + b"\x80" * 16_378 + b"\x00\x00\x03",
        b"\x57\x00" * 8000,
        b"\x70\x82\x3f\xf0" * 4000,
        bytes(16_384),
        b"x" * 16_384,
    ],
)
def test_the_longest_message_is_refused_in_bounded_time(data: bytes) -> None:
    for reader in READERS:
        for form in FORMATS:
            # The slowest takes 90,000.
            assert steps(partial(attempt, reader, form, data)) < 2_000_000


@pytest.mark.parametrize(
    ("reader", "form", "data", "reason"),
    [
        ("magtek", "track2", b"", "number of fields"),
        ("magtek", "track2", b"%B|0600|", "number of fields"),
        ("magtek", "track2", b"|" * 40, "number of fields"),
        ("magtek", "track2", b"|0600||ZZ||", "not hexadecimal"),
        ("magtek", "track2", b"|0600||||", "nothing encrypted"),
        ("idtech", "track2", b"", "not in a frame"),
        ("idtech", "track2", b"\x02" + bytes(20) + b"\x03", "wrong length or check byte"),
        ("idtech", "emv-tlv", tlv("57", CHIP_TRACK2), "nothing encrypted"),
        ("verifone", "emv-tlv", tlv("57", CHIP_TRACK2), "nothing encrypted"),
        ("ingenico", "emv-tlv", b"", "nothing encrypted"),
        ("emv-values", "emv-tlv", tlv("57", bytes(8)) * 2, "twice"),
        ("emv-values", "emv-tlv", tlv("57", b""), "nothing encrypted"),
        ("generic", "track2", bytes(16_385), "too long"),
    ],
)
def test_an_envelope_that_is_none_is_refused_with_its_reason(
    reader: str, form: Format, data: bytes, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        unwrap(READERS[reader], form, data)
    assert raised.value.code == "DECRYPT_FAILED"


def frame(card: bytes) -> bytes:
    lrc = 0
    for byte in card:
        lrc ^= byte
    return b"\x02" + len(card).to_bytes(2, "little") + card + bytes([lrc, sum(card) & 255, 3])


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (bytes([0x81, 0x1F, 0, 40, 0, 0x82, 0x82]), "not hold a bank card"),
        (bytes([0x80, 0x1F, 0, 40, 0, 0x02, 0x02]) + bytes(79), "cut short"),
        (bytes([0x80, 0x5F, 0, 40, 0, 0x02, 0x02]), "cut short"),
        (bytes([0x80, 0x1F, 0, 40, 0, 0x02, 0x00]) + bytes(40), "nothing encrypted"),
        (bytes([0x00, 0x1F, 0, 0, 0, 0, 0]), "nothing encrypted"),
    ],
)
def test_a_frame_whose_lengths_lie_is_refused(card: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        unwrap(READERS["idtech"], "track2", frame(card))


@pytest.mark.parametrize(
    "data",
    [
        magtek_line(CardReader(), pan=PAN, track2=TRACK2).replace(b"=2512", b"=2612", 1),
        magtek_line(CardReader(), pan=PAN, track2=TRACK2),
    ],
)
async def test_only_the_number_of_what_is_masked_is_compared(data: bytes) -> None:
    card = await sealed(Sample("magtek", "track2", data))
    assert opened(card)["expiry"] == "2512"


@pytest.mark.parametrize(
    ("reader", "form", "data"),
    [
        ("magtek", "track2", magtek_line(CardReader(), pan=OTHER, track2=TRACK2.replace(PAN, OTHER))
         .replace(OTHER[-4:].encode(), b"1111", 1)),
        ("magtek", "emv-tlv", magtek_chip(CardReader(), tlv("57", CHIP_TRACK2),
         masked=";4012000000001881=2512?")),
        ("idtech", "emv-tlv", marked("5A", bytes.fromhex("4012CCCCCCCC1881"), 0x20)
         + marked("5A", CardReader().encrypt(tlv("5A", bytes.fromhex(PAN))), 0x40)),
    ],
)  # fmt: skip
async def test_a_masked_number_of_another_card_is_refused(
    reader: str, form: Format, data: bytes
) -> None:
    with pytest.raises(InputError, match="another card's") as raised:
        await sealed(Sample(reader, form, data))
    assert raised.value.code == "DECRYPT_FAILED"


async def test_two_pieces_under_one_counter_that_are_two_cards_are_refused() -> None:
    reader = CardReader()
    tags = tlv("57", reader.encrypt(tlv("57", CHIP_TRACK2)))
    tags += tlv("5A", reader.encrypt(tlv("5A", bytes.fromhex(OTHER))))
    with pytest.raises(InputError, match="two card numbers that differ"):
        await sealed(Sample("emv-objects", "emv-tlv", tags))


async def test_a_reader_that_this_version_does_not_know_is_our_fault_and_may_be_sent_again() -> (
    None
):
    sample = Sample("unheard-of", "track2", SAMPLES[0].data)
    with pytest.raises(InternalError) as raised:
        await sealed(sample)
    assert raised.value.retryable


# ---- what comes out


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
async def test_what_a_reader_sends_becomes_its_card(sample: Sample) -> None:
    card = await sealed(sample)
    assert opened(card) == {
        "pan": PAN,
        "expiry": "2512",
        "cardholder_name": sample.name,
        "service_code": sample.code,
    }
    assert (card.brand, card.last4, card.exp_month, card.exp_year) == ("visa", "1111", 12, 2025)
    assert card.sensitive_ciphertext is None
    assert card.fingerprint == (await sealed(SAMPLES[0])).fingerprint


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
async def test_what_may_be_kept_is_sealed_apart_and_never_of_a_keyed_in_card(
    sample: Sample,
) -> None:
    card = await sealed(sample, keep=True)
    chip = sample.form == "emv-tlv"
    if sample.track2 is None and not chip:
        assert card.sensitive_ciphertext is None
        return
    assert card.sensitive_ciphertext is not None
    place = cipher.sensitive_associated_data(TOKEN, "v1")
    kept = orjson.loads(SEALER.open_sealed(card.sensitive_ciphertext, associated_data=place))
    assert set(kept) == {"track2", "emv"}
    if sample.reader == "emv-values" and sample.track2:
        # Zeros behind a bare value may be the track's own or the cipher's filling.
        assert kept["track2"].rstrip("0") == sample.track2
    else:
        assert kept["track2"] == sample.track2
    assert (CRYPTOGRAM.hex().upper() in kept["emv"]) if chip else (kept["emv"] is None)


async def test_a_mac_is_over_the_ciphertexts_and_not_over_what_is_around_them() -> None:
    reader = CardReader()
    sample = Sample("magtek", "track2", magtek_line(reader, pan=PAN, track1=TRACK1, track2=TRACK2))
    over = reader.encrypt(TRACK1.encode()) + reader.encrypt(TRACK2.encode())
    keys = Keys("magtek", mac="required")
    assert (await actor(keys).receive(message(sample, mac=reader.mac(over)))).last4 == "1111"
    for wrong in (reader.mac(reader.encrypt(TRACK2.encode())), bytes(8), None):
        with pytest.raises(InputError) as raised:
            await actor(keys).receive(message(sample, mac=wrong))
        assert raised.value.code == "MAC_INVALID"


async def test_a_rekeyed_device_s_old_keys_are_dropped_and_the_new_ones_fetched_once() -> None:
    keys, sample = Keys("generic"), SAMPLES[0]
    found = actor(keys)
    await found.receive(message(sample))
    await found.receive(message(sample))
    assert keys.asked == [("set", INITIAL_KSN)]
    other = bytes.fromhex("FFFF9876543211000000")
    key = dukpt.initial_key("tdes-dukpt", BDK, other)
    device = Dukpt(keys.key.profile, key, dukpt.initial_key_id("tdes-dukpt", other))
    data = device.encrypt(1, TRACK2.encode())
    for _ in range(2):
        assert (await found.receive(message(sample, data=data, ksn=other))).last4 == "1111"
    assert keys.asked == [("set", INITIAL_KSN), ("set", other)]
    await found.on_passivate()
    await found.receive(message(sample))
    assert len(keys.asked) == 3


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
async def test_every_clear_buffer_is_overwritten_whether_it_was_a_card_or_not(
    monkeypatch: pytest.MonkeyPatch, sample: Sample, keep: bool
) -> None:
    buffers: list[bytearray] = []
    decrypt, pack = Dukpt.decrypt, cipher.pack

    def decrypted(self: Dukpt, counter: int, ciphertext: bytes) -> bytearray:
        buffers.append(decrypt(self, counter, ciphertext))
        return buffers[-1]

    def packed(card: cards.Card) -> bytearray:
        kept = [each for each in (card.track2, card.emv) if each is not None]
        assert bool(kept) <= keep
        buffers.extend([pack(card), card.pan, *kept])
        return buffers[-2 - len(kept)]

    monkeypatch.setattr(Dukpt, "decrypt", decrypted)
    monkeypatch.setattr(cipher, "pack", packed)
    await sealed(sample, keep=keep)
    assert len(buffers) >= 3
    assert not any(any(buffer) for buffer in buffers)
    # Under a key that fits nothing, what comes out is noise, and refused.
    buffers.clear()
    keys = Keys(sample.reader, "pin" if sample.usage == "data" else "data")
    with pytest.raises(InputError):
        await actor(keys).receive(message(sample, keep=keep))
    assert buffers
    assert not any(any(buffer) for buffer in buffers)


def test_the_default_reader_is_one_of_them() -> None:
    assert GENERIC_READER in readers.reader_names
    assert readers.reader_names == READERS.keys()


# ---- the vendors' own samples


def vendor_device(ksn: bytes, usage: str) -> Dukpt:
    key_id = dukpt.initial_key_id("tdes-dukpt", ksn)
    key = dukpt.initial_key("tdes-dukpt", BDK, ksn)
    return Dukpt(Profile(scheme="tdes-dukpt", data_usage=usage), key, key_id)


def test_the_swipe_printed_in_magtek_s_manual_decrypts_to_what_is_printed_there() -> None:
    """99875483-6 (iDynamo, MagneSafe V5), KSN FFFF9876543210E00008. Its PAN fails Luhn."""
    line = (
        "%B5452000000007189^HOGAN/PAUL      ^08040000000000000000000?"
        ";5452000000007189=080400000000000000?|0600"
        "|C25C1D1197D31CAA87285D59A892047426D9182EC11353C051ADD6D0F072A6CB"
        "3436560B3071FC1FD11D9F7E74886742D9BEE0CFD1EA1064C213BB55278B2F12"
        "|724C5DB7D6F901C7F0FEAE7908801093B3DBFE51CCF6D483E789D7D2C007D539499BAADCC8D16CA2"
        "|E31234A91059A0FBFE627954EE21868AEE3979540B67FCC40F61CECA54152D1E|A1050000|8628E664"
        "||21685F158B5C6BE0|FFFF9876543210E00008|B78F||0000"
    )
    found = unwrap(READERS["magtek"], "track2", line.encode())
    device = vendor_device(bytes.fromhex("FFFF9876543210E00008"), "pin")
    clear = [bytes(device.decrypt(8, piece.data)).rstrip(b"\0") for piece in found.ciphertexts]
    assert clear == [
        b"%B5452300551227189^HOGAN/PAUL      ^08043210000000725000000?",
        b";5452300551227189=080432100000007250?",
    ]
    assert [each.pan for each in found.masked] == [b"5452000000007189"] * 2


def test_the_swipe_printed_in_id_tech_s_manual_decrypts_to_its_two_tracks() -> None:
    """Original format, as printed for SecureMag and Unitech's MS246 (8.6.1). No good PAN either."""
    data = bytes.fromhex(
        "027D01003F48236B252A343236362A2A2A2A2A2A2A2A393939395E42555348204A522F47454F52474520572E"
        "4D525E2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A3F2A3B343236362A2A2A"
        "2A2A2A2A2A393939393D2A2A2A2A2A2A2A2A2A2A2A2A2A2A2A3F2A3B33333333333333333333373637363736"
        "3037303730373736373637363333333333333333333337363736373630373037303737363736373633333333"
        "3333333333333736373637363037303730373736373637363333333333333333333337363736373630373037"
        "3F32863E9E3DA28E455B28F7736B77E47A64EDDA3BF03A06E44F31D1818C0BCD7A353FB1AD70EFD30FFC3DA0"
        "8A4FBC9372E57E8B40848BAEAA3FE724B3550E2F4B223E6BF264BEAE9E39142B648CDB51FB8DAF8EA5B63913"
        "D29419B67582FCCCE9B372660F03668CC453216D9449C6B67EF33418AC88F65E1DB7ED4D10973F99DFC8463F"
        "F6DF113B6226C4898A9D355057ECAF11A5598F02CA3162994901190000000001399F03"
    )
    found = unwrap(READERS["idtech"], "track2", data)
    (piece,) = found.ciphertexts
    clear = vendor_device(bytes.fromhex("62994901190000000001"), "data").decrypt(1, piece.data)
    assert bytes(clear) == (
        b"%B4266841088889999^BUSH JR/GEORGE W.MR^0809101100001100000000046000000?!"
        b";4266841088889999=080910110000046?0" + bytes(5)
    )
    assert [each.pan for each in found.masked] == [b"4266********9999"] * 2
    with pytest.raises(InputError, match="check digit"):
        cards.parse(piece.form, clear)
