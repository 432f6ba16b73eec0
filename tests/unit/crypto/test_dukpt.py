"""The face of DUKPT: KSNs, profiles, and one device's messages; what must be refused first."""

import gc
import sys

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.crypto import dukpt, dukpt_aes, dukpt_tdes
from glamd.crypto.counter_tree import KeyTree
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, Dukpt, Profile
from glamd.crypto.mac import AES_CMAC
from glamd.errors import CryptoError, InputError

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=60)
TDES_BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
TDES_KSN = bytes.fromhex("FFFF9876543210E00001")
AES_BDK = bytes.fromhex("FEDCBA9876543210F1F1F1F1F1F1F1F1")
AES_KSN = bytes.fromhex("123456789012345600000001")
TRACK = b";4012345678909=2512101000000000?"

EVERY_PROFILE = [
    *(
        Profile(scheme=TDES_DUKPT, data_usage=usage, padding=padding)
        for usage in ("data", "pin")
        for padding in ("zero", "pkcs7", "none")
    ),
    *(
        Profile(scheme=AES_DUKPT, data_usage=usage, key_type=key_type, padding=padding)
        for usage in ("encrypt", "both")
        for key_type in (None, "aes-128", "2tdea", "3tdea")
        for padding in ("zero", "pkcs7", "none")
    ),
]


def device(profile: Profile, *, bdk_bytes: int = 16) -> Dukpt:
    """A device of this profile with the public test keys."""
    tdes = profile.scheme == TDES_DUKPT
    bdk = TDES_BDK if tdes else (AES_BDK * 2)[:bdk_bytes]
    ksn = TDES_KSN if tdes else AES_KSN
    initial_key = dukpt.initial_key(profile.scheme, bdk, ksn)
    return Dukpt(profile, initial_key, dukpt.initial_key_id(profile.scheme, ksn))


def block_bytes(profile: Profile) -> int:
    """How long a block of this profile's cipher is."""
    tdea = profile.scheme == TDES_DUKPT or "tdea" in (profile.key_type or "")
    return 8 if tdea else 16


def bare_cbc(algorithm: BlockCipherAlgorithm, clear: bytes) -> bytes:
    """What a device would send, without any of our code."""
    iv = bytes(algorithm.block_size // 8)
    context = Cipher(algorithm, modes.CBC(iv)).encryptor()
    return context.update(clear) + context.finalize()


# ---- the parts of a KSN


def test_an_unknown_scheme_is_refused_by_name() -> None:
    for call in (
        lambda: dukpt.ksn_length_bytes("des-dukpt"),
        lambda: dukpt.initial_key_id("des-dukpt", TDES_KSN),
        lambda: dukpt.counter_of("", TDES_KSN),
        lambda: dukpt.valid_counter("des-dukpt", 1),
        lambda: dukpt.next_counter("des-dukpt", 1),
        lambda: dukpt.initial_key("des-dukpt", TDES_BDK, TDES_KSN),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert [error.field for error in caught.value.fields] == ["scheme"]


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
@pytest.mark.parametrize("length", [0, 1, 8, 9, 11, 13, 64])
def test_a_ksn_of_another_length_is_refused(scheme: str, length: int) -> None:
    for read in (dukpt.initial_key_id, dukpt.counter_of):
        with pytest.raises(InputError) as caught:
            read(scheme, bytes(length))
        assert [error.field for error in caught.value.fields] == ["ksn"]


@pytest.mark.parametrize(
    ("scheme", "bdk_bytes"),
    [(TDES_DUKPT, 8), (TDES_DUKPT, 24), (TDES_DUKPT, 0), (AES_DUKPT, 15), (AES_DUKPT, 33)],
)
def test_a_bdk_of_another_length_is_refused_and_not_shown(scheme: str, bdk_bytes: int) -> None:
    ksn = TDES_KSN if scheme == TDES_DUKPT else AES_KSN
    with pytest.raises(InputError) as caught:
        dukpt.initial_key(scheme, b"\xab" * bdk_bytes, ksn)
    assert [error.field for error in caught.value.fields] == ["bdk"]
    assert "ab" * 4 not in repr(caught.value).lower()


def test_an_id_with_counter_bits_or_of_another_length_is_no_id() -> None:
    for scheme, key_id, counter in (
        (TDES_DUKPT, TDES_KSN, 1),
        (TDES_DUKPT, TDES_KSN[:9], 1),
        (AES_DUKPT, AES_KSN, 1),
        (TDES_DUKPT, bytes(10), 1 << 21),
        (AES_DUKPT, bytes(8), 1 << 32),
        (AES_DUKPT, bytes(8), -1),
    ):
        with pytest.raises(InputError):
            dukpt.ksn_with_counter(scheme, key_id, counter)
    with pytest.raises(InputError):
        dukpt_tdes.Deriver(TDES_BDK, TDES_KSN)


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
@REPEATABLE
@given(data=st.data())
def test_a_ksn_taken_apart_and_put_together_is_the_same(scheme: str, data: st.DataObject) -> None:
    length = dukpt.ksn_length_bytes(scheme)
    ksn = data.draw(st.binary(min_size=length, max_size=length))
    key_id, counter = dukpt.initial_key_id(scheme, ksn), dukpt.counter_of(scheme, ksn)
    assert dukpt.ksn_with_counter(scheme, key_id, counter) == ksn
    assert dukpt.counter_of(scheme, dukpt.ksn_with_counter(scheme, key_id, 0)) == 0


def test_the_initial_key_is_the_same_whatever_the_counter() -> None:
    for scheme, bdk, ksn in ((TDES_DUKPT, TDES_BDK, TDES_KSN), (AES_DUKPT, AES_BDK, AES_KSN)):
        key_id = dukpt.initial_key_id(scheme, ksn)
        later = dukpt.ksn_with_counter(scheme, key_id, 0x1FF800)
        assert dukpt.initial_key(scheme, bdk, later) == dukpt.initial_key(scheme, bdk, ksn)


# ---- profiles


def test_a_profile_names_every_field_that_is_wrong_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Profile(scheme="x", data_usage="x", key_type="x", padding="x", mac="x")
    fields = [error.field for error in caught.value.fields]
    assert fields == ["scheme", "data_usage", "padding", "mac", "key_type"]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("data_usage", {"scheme": TDES_DUKPT, "data_usage": "encrypt"}),
        ("data_usage", {"scheme": AES_DUKPT, "data_usage": "pin"}),
        ("key_type", {"scheme": TDES_DUKPT, "key_type": "aes-128"}),
        ("key_type", {"scheme": AES_DUKPT, "key_type": "AES128"}),
        ("padding", {"scheme": AES_DUKPT, "padding": ""}),
        ("mac", {"scheme": AES_DUKPT, "mac": "forbidden"}),
    ],
)
def test_a_profile_with_a_foreign_value_is_refused(field: str, arguments: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        Profile(**arguments)
    assert [error.field for error in caught.value.fields] == [field]


def test_a_profile_has_the_defaults_of_the_contract() -> None:
    tdes, aes = Profile(scheme=TDES_DUKPT), Profile(scheme=AES_DUKPT)
    assert (tdes.data_usage, tdes.padding, tdes.mac, tdes.key_type) == (
        "data",
        "zero",
        "optional",
        None,
    )
    assert (aes.data_usage, aes.padding, aes.mac, aes.key_type) == (
        "encrypt",
        "zero",
        "optional",
        None,
    )
    assert Profile(scheme=AES_DUKPT, data_usage="encrypt") == aes, "the default is spelled out"


def test_a_working_key_stronger_than_the_initial_key_is_refused() -> None:
    for key_type, bdk_bytes in (("aes-256", 16), ("aes-192", 16), ("aes-256", 24)):
        with pytest.raises(InputError) as caught:
            device(Profile(scheme=AES_DUKPT, key_type=key_type), bdk_bytes=bdk_bytes)
        assert [error.field for error in caught.value.fields] == ["key_type"]
    with pytest.raises(InputError):
        dukpt_aes.update_key(bytes(16), bytes(8), dukpt_aes.KeyType.AES_256)


@pytest.mark.parametrize("length", [0, 8, 15, 17, 24])
def test_an_initial_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(InputError) as caught:
        Dukpt(Profile(scheme=TDES_DUKPT), bytes(length), bytes(10))
    assert [error.field for error in caught.value.fields] == ["initial_key"]
    if length != 24:
        with pytest.raises(InputError):
            Dukpt(Profile(scheme=AES_DUKPT), bytes(length), bytes(8))


# ---- messages


@pytest.mark.parametrize("profile", EVERY_PROFILE, ids=repr)
def test_a_ciphertext_of_an_impossible_length_is_refused(profile: Profile) -> None:
    block = block_bytes(profile)
    for length in (0, 1, block - 1, block + 1, 3 * block - 1, dukpt.MAX_MESSAGE_BYTES + block):
        with pytest.raises(CryptoError):
            device(profile).decrypt(1, bytes(length))


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
def test_a_counter_that_a_device_must_skip_decrypts_nothing(scheme: str) -> None:
    terminal = device(Profile(scheme=scheme))
    for counter in (0, -1, 0x1FFFFF, 0xFFFFFFFF, 1 << 40):
        for call in (
            lambda c=counter: terminal.decrypt(c, bytes(16)),
            lambda c=counter: terminal.encrypt(c, TRACK),
            lambda c=counter: terminal.verify_mac(c, bytes(16), bytes(8)),
            lambda c=counter: terminal.mac(c, bytes(16), 8),
        ):
            with pytest.raises(InputError) as caught:
                call()
            assert caught.value.code == "KSN_INVALID"
    assert terminal.held_keys == 0


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
@pytest.mark.parametrize("tail", ["00", "0002", "0203", "ff", "11", "10"])
def test_pkcs7_padding_that_is_not_right_is_refused(scheme: str, tail: str) -> None:
    sender = device(Profile(scheme=scheme, padding="none"))
    receiver = device(Profile(scheme=scheme, padding="pkcs7"))
    bad = bytes.fromhex(tail).rjust(32, b"x")
    with pytest.raises(CryptoError):
        receiver.decrypt(1, sender.encrypt(1, bad))


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
def test_pkcs7_padding_longer_than_a_block_is_refused(scheme: str) -> None:
    sender = device(Profile(scheme=scheme, padding="none"))
    receiver = device(Profile(scheme=scheme, padding="pkcs7"))
    with pytest.raises(CryptoError):
        receiver.decrypt(1, sender.encrypt(1, b"\x20" * 32))


def test_clear_data_with_bad_padding_is_overwritten_before_the_refusal() -> None:
    sender = device(Profile(scheme=AES_DUKPT, padding="none"))
    receiver = device(Profile(scheme=AES_DUKPT, padding="pkcs7"))
    with pytest.raises(CryptoError) as caught:
        receiver.decrypt(1, sender.encrypt(1, TRACK))
    trace, buffers = caught.value.__traceback__, []
    while trace is not None:
        buffers += [v for v in trace.tb_frame.f_locals.values() if isinstance(v, bytearray)]
        trace = trace.tb_next
    assert buffers
    assert all(not any(buffer) for buffer in buffers)


def test_a_damaged_ciphertext_never_gives_the_clear_data() -> None:
    for profile in EVERY_PROFILE:
        terminal = device(profile)
        sent = terminal.encrypt(5, TRACK)
        for at in range(len(sent)):
            damaged = bytearray(sent)
            damaged[at] ^= 0x01
            try:
                clear = terminal.decrypt(5, bytes(damaged))
            except CryptoError:
                continue
            assert clear.rstrip(b"\0") != TRACK


def test_without_padding_only_whole_blocks_can_be_sent() -> None:
    with pytest.raises(InputError):
        device(Profile(scheme=AES_DUKPT, padding="none")).encrypt(1, b"x" * 17)


@pytest.mark.parametrize("padding", ["zero", "none"])
def test_there_is_no_message_of_nothing_and_none_too_long(padding: str) -> None:
    terminal = device(Profile(scheme=AES_DUKPT, padding=padding))
    for clear in (b"", bytes(dukpt.MAX_MESSAGE_BYTES + 16)):
        with pytest.raises(InputError):
            terminal.encrypt(1, clear)


@pytest.mark.parametrize("profile", EVERY_PROFILE, ids=repr)
def test_what_a_device_encrypts_the_host_decrypts(profile: Profile) -> None:
    terminal, host = device(profile), device(profile)
    block = block_bytes(profile)
    for size in range(1, 50):
        clear = bytes(range(1, size + 1))
        if profile.padding == "none" and size % block:
            continue
        decrypted = host.decrypt(size, terminal.encrypt(size, clear))
        assert isinstance(decrypted, bytearray)
        if profile.padding == "zero":
            assert decrypted[:size] == clear
            assert decrypted[size:] == bytes(-size % block)
        else:
            assert decrypted == clear


def test_zero_padding_leaves_chip_data_that_ends_in_zero_whole() -> None:
    """5F34 01 00 is a PAN sequence number of 00: its last byte is not padding."""
    terminal = device(Profile(scheme=TDES_DUKPT))
    chip = bytes.fromhex("5A0841111111111111115F340100")
    assert terminal.decrypt(1, terminal.encrypt(1, chip))[: len(chip)] == chip


def test_the_last_message_size_that_fits_is_taken() -> None:
    terminal = device(Profile(scheme=AES_DUKPT))
    clear = b"x" * dukpt.MAX_MESSAGE_BYTES
    assert terminal.decrypt(1, terminal.encrypt(1, clear)) == clear


@pytest.mark.parametrize(
    ("data_usage", "key_type", "key"),
    [
        ("encrypt", None, "A35C412EFD41FDB98B69797C02DCD08F"),
        ("both", None, "A308E080DD15A1B741F1721BF67DE11C"),
        ("encrypt", "2tdea", "BD44121C223F831446A01EE3A4CB58D2"),
        ("encrypt", "3tdea", "F716DFBC6B2D2D5825B694EEEE181A013F2F1C09380BBE0C"),
    ],
)
def test_a_profile_picks_the_published_data_key(
    data_usage: str, key_type: str | None, key: str
) -> None:
    raw = bytes.fromhex(key)
    wide = raw if len(raw) == 24 else raw + raw[:8]
    algorithm = TripleDES(wide) if key_type else AES(raw)
    profile = Profile(scheme=AES_DUKPT, data_usage=data_usage, key_type=key_type, padding="none")
    assert device(profile).decrypt(1, bare_cbc(algorithm, TRACK)) == TRACK


def test_the_pin_variant_is_used_without_the_one_way_function() -> None:
    key = bytes.fromhex("042666B49184CF5C68DE9628D0397B36")
    profile = Profile(scheme=TDES_DUKPT, data_usage="pin", padding="none")
    assert device(profile).decrypt(1, bare_cbc(TripleDES(key + key[:8]), TRACK)) == TRACK


def test_the_key_of_a_response_is_its_variant_through_the_one_way_function() -> None:
    """Our own check, because nobody publishes this one: table A-1 and figure A-2, by hand."""
    current = bytes.fromhex("042666B49184CFA368DE9628D0397BC9")
    mask = bytes.fromhex("000000FF00000000") * 2
    variant = bytes(a ^ b for a, b in zip(current, mask, strict=True))
    algorithm = TripleDES(variant + variant[:8])
    halves = [bare_cbc(algorithm, half) for half in (variant[:8], variant[8:])]
    initial_key = dukpt.initial_key(TDES_DUKPT, TDES_BDK, TDES_KSN)
    deriver = dukpt_tdes.Deriver(initial_key, dukpt.initial_key_id(TDES_DUKPT, TDES_KSN))
    assert deriver.transaction_key(1) == current
    assert deriver.working_keys(dukpt_tdes.Usage.DATA_RESPONSE)(1) == b"".join(halves)


# ---- MACs


@pytest.mark.parametrize("profile", EVERY_PROFILE, ids=repr)
def test_only_the_right_mac_of_a_right_length_verifies(profile: Profile) -> None:
    terminal = device(profile)
    sent = terminal.encrypt(3, TRACK)
    lengths = (4, 8) if profile.scheme == TDES_DUKPT else (8, 16)
    for length in lengths:
        good = terminal.mac(3, sent, length)
        assert len(good) == length
        assert terminal.verify_mac(3, sent, good)
        assert not terminal.verify_mac(4, sent, good), "another counter's"
        assert not terminal.verify_mac(3, sent[:-1] + b"\0", good)
        for at in range(length):
            damaged = bytearray(good)
            damaged[at] ^= 0x80
            assert not terminal.verify_mac(3, sent, bytes(damaged))
    whole = terminal.mac(3, sent, lengths[1])
    for length in set(range(20)) - set(lengths):
        assert not terminal.verify_mac(3, sent, whole.ljust(20, b"\0")[:length])
        with pytest.raises(InputError):
            terminal.mac(3, sent, length)


def test_the_mac_of_an_aes_device_is_under_the_published_mac_generation_key() -> None:
    key = bytes.fromhex("A2DC23DE6FDE0824A2BC321E08E4B8B7")
    expected = AES_CMAC.generate(key, TRACK, length_bytes=16)
    assert device(Profile(scheme=AES_DUKPT)).mac(1, TRACK, 16) == expected


def test_the_mac_of_a_device_with_tdea_data_keys_is_under_an_aes_key() -> None:
    plain = device(Profile(scheme=AES_DUKPT))
    with_tdea = device(Profile(scheme=AES_DUKPT, key_type="2tdea"))
    assert with_tdea.mac(1, TRACK, 16) == plain.mac(1, TRACK, 16)


def test_the_mac_key_is_as_long_as_the_profile_says() -> None:
    half = device(Profile(scheme=AES_DUKPT, key_type="aes-128"), bdk_bytes=32)
    whole = device(Profile(scheme=AES_DUKPT), bdk_bytes=32)
    assert half.mac(1, TRACK, 16) != whole.mac(1, TRACK, 16)


# ---- keys do not leak and do not stay


def test_nothing_that_holds_keys_shows_them() -> None:
    for profile in EVERY_PROFILE:
        terminal = device(profile)
        terminal.decrypt(3, terminal.encrypt(3, TRACK))
        deriver = terminal._deriver
        keys = {deriver.transaction_key(3), terminal._data_key(3), terminal._mac_key(3)}
        parts = (terminal, deriver, deriver._tree, terminal._data_key, terminal._mac_key)
        shown = "".join(repr(part) + str(part) for part in parts)
        for key in keys:
            assert key.hex() not in shown.lower()
            assert repr(key)[2:-1] not in shown
    assert "masked" in shown


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
def test_after_forget_nothing_works_and_nothing_holds_the_initial_key(scheme: str) -> None:
    key_id = dukpt.initial_key_id(scheme, bytes(dukpt.ksn_length_bytes(scheme)))
    initial_key = b"".join((b"0123456789", b"abcdef"))
    references = sys.getrefcount(initial_key)
    terminal = Dukpt(Profile(scheme=scheme), initial_key, key_id)
    sent = terminal.encrypt(7, TRACK)
    terminal.forget()
    assert terminal.held_keys == 0
    assert sys.getrefcount(initial_key) == references
    for call in (
        lambda: terminal.decrypt(7, sent),
        lambda: terminal.encrypt(7, TRACK),
        lambda: terminal.verify_mac(7, sent, bytes(8)),
        lambda: terminal.mac(7, sent, 8),
    ):
        with pytest.raises(CryptoError):
            call()


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
def test_an_object_that_is_dropped_frees_its_keys_without_the_garbage_collector(
    scheme: str,
) -> None:
    key_id = dukpt.initial_key_id(scheme, bytes(dukpt.ksn_length_bytes(scheme)))
    before = trees()
    gc.disable()
    try:
        terminal = Dukpt(Profile(scheme=scheme), b"0123456789abcdef", key_id)
        terminal.encrypt(7, TRACK)
        assert trees() == before + 1
        del terminal
        assert trees() == before
    finally:
        gc.enable()


def trees() -> int:
    return sum(isinstance(each, KeyTree) for each in gc.get_objects())


@pytest.mark.parametrize(("scheme", "bits"), [(TDES_DUKPT, 21), (AES_DUKPT, 32)])
def test_what_is_remembered_stays_below_the_bits_of_the_counter(scheme: str, bits: int) -> None:
    terminal = device(Profile(scheme=scheme))
    for bit in range(bits):
        terminal.encrypt(1 << bit, TRACK)
        terminal.encrypt(1 << bit | 1, TRACK)
    for counter in range(1, 600):
        terminal.encrypt(counter, TRACK)
    assert terminal.held_keys <= bits


def test_every_counter_has_keys_of_its_own() -> None:
    terminal = device(Profile(scheme=AES_DUKPT))
    sent = {terminal.encrypt(counter, TRACK) for counter in range(1, 200)}
    assert len(sent) == 199
