"""Key blocks: every one that is not a whole base derivation key for the scheme is refused by field.

The good ones are made twice: by psec, and by an encoder that is written here after X9.143 and
shares nothing with what reads them.
"""

import warnings
from collections.abc import Callable

import psec
import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.utils import CryptographyDeprecationWarning
from hypothesis import given
from hypothesis import strategies as st

from glamd.crypto import keyblock
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT
from glamd.errors import InputError

BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
AES_BDK = bytes(range(32))
TDES_KBPK = bytes.fromhex("1C587F1CD8F5E3B92A4D6E0851AB91C7")
AES_KBPK = bytes(range(100, 132))
B_HEADER = "B0000B0TX00E0000"
D_HEADER = "D0000B0AX00E0000"


# ---- an encoder of its own: the key derivation binding methods of X9.143


def algorithm_of(version: str, key: bytes) -> TripleDES | AES:
    return TripleDES((key * 3)[:24]) if version == "B" else AES(key)


def mac_of(version: str, key: bytes, message: bytes) -> bytes:
    context = CMAC(algorithm_of(version, key))
    context.update(message)
    return context.finalize()


def derived(version: str, kbpk: bytes, usage: int) -> bytes:
    """Counter, usage, a zero, algorithm, length in bits: CMAC by CMAC until it is long enough."""
    indicator = {("B", 16): 0, ("B", 24): 1, ("D", 16): 2, ("D", 24): 3, ("D", 32): 4}
    made = b""
    for counter in range(1, 5):
        made += mac_of(
            version,
            kbpk,
            bytes([counter])
            + usage.to_bytes(2)
            + b"\0"
            + indicator[version, len(kbpk)].to_bytes(2)
            + (len(kbpk) * 8).to_bytes(2),
        )
    return made[: len(kbpk)]


def encoded(
    header: str, key: bytes, kbpk: bytes, *, blocks: tuple[str, ...] = (), hide_bytes: int = 8
) -> str:
    """A key block; `header` has 16 characters, of which the length and the count are filled in."""
    version = header[0]
    size = 8 if version == "B" else 16
    optional = "".join(blocks)
    count = len(blocks)
    if len(optional) % size:
        pad = -(len(optional) + 4) % size
        optional += f"PB{4 + pad:02X}" + "0" * pad
        count += 1
    clear = (len(key) * 8).to_bytes(2) + key + bytes(hide_bytes)
    clear += b"\xa5" * (-len(clear) % size)
    mac_bytes = 8 if version == "B" else 16
    length = 16 + len(optional) + 2 * len(clear) + 2 * mac_bytes
    whole = f"{version}{length:04}{header[5:12]}{count:02}{header[14:16]}{optional}"
    mac = mac_of(version, derived(version, kbpk, 1), whole.encode() + clear)
    encryption = algorithm_of(version, derived(version, kbpk, 0))
    encryptor = Cipher(encryption, modes.CBC(mac)).encryptor()
    return whole + encryptor.update(clear).hex().upper() + mac.hex().upper()


def wrapped_by_psec(kbpk: bytes, header: str, key: bytes) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return psec.tr31.wrap(kbpk, header, key)


def b_block(*, header: str = B_HEADER, key: bytes = BDK, blocks: tuple[str, ...] = ()) -> str:
    return encoded(header, key, TDES_KBPK, blocks=blocks)


def d_block(*, header: str = D_HEADER, key: bytes = AES_BDK, blocks: tuple[str, ...] = ()) -> str:
    return encoded(header, key, AES_KBPK, blocks=blocks)


def refused(block: str, *, kbpk: bytes = TDES_KBPK, scheme: str = TDES_DUKPT) -> str:
    """The one field that is named."""
    with pytest.raises(InputError) as raised:
        keyblock.unwrap_bdk(block, kbpk=kbpk, scheme=scheme)
    (only,) = raised.value.fields
    said = str(raised.value).upper()
    for key in (kbpk, BDK, AES_BDK):
        assert key.hex().upper() not in said
    assert block[20:40].upper() not in said or len(block) < 40
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return only.field


# ---- what is refused


@pytest.mark.parametrize(
    ("kbpk", "scheme"),
    [
        (bytes(15) + b"\1", TDES_DUKPT),
        (TDES_KBPK[:15] + b"\x55", TDES_DUKPT),
        (TDES_KBPK + TDES_KBPK[:8][::-1], TDES_DUKPT),
    ],
)
def test_another_protection_key_opens_nothing(kbpk: bytes, scheme: str) -> None:
    assert refused(b_block(), kbpk=kbpk, scheme=scheme) == "kbpk"


@pytest.mark.parametrize("length", [1, 8, 15, 17, 32])
def test_a_protection_key_of_a_length_that_the_version_does_not_have_is_named(length: int) -> None:
    assert refused(b_block(), kbpk=b"\x11" * length) == "kbpk"
    if length != 32:
        assert refused(d_block(), kbpk=b"\x11" * length, scheme=AES_DUKPT) == "kbpk"


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("B0000P0TX00E0000", "key_block.usage"),
        ("B0000B1TX00E0000", "key_block.usage"),
        ("B0000K1TX00E0000", "key_block.usage"),
        ("B0000b0TX00E0000", "key_block.usage"),
        ("B0000B0AX00E0000", "key_block.algorithm"),
        ("B0000B0DX00E0000", "key_block.algorithm"),
        ("B0000B0TN00E0000", "key_block.mode_of_use"),
        ("B0000B0TE00E0000", "key_block.mode_of_use"),
        ("B0000B0TXc1E0000", "key_block.key_version"),
    ],
)
def test_a_block_for_another_use_is_refused_though_its_mac_is_right(
    header: str, field: str
) -> None:
    assert refused(b_block(header=header)) == field


def test_a_block_for_the_other_scheme_is_refused() -> None:
    assert refused(d_block(), kbpk=AES_KBPK) == "key_block.algorithm"
    assert refused(b_block(), scheme=AES_DUKPT) == "key_block.algorithm"
    assert refused(b_block(), scheme="rot13") == "scheme"


def test_an_aes_key_under_tdes_is_refused_as_is_one_under_a_shorter_aes_key() -> None:
    block = b_block(header="B0000B0AX00E0000", key=AES_BDK[:16])
    assert refused(block, scheme=AES_DUKPT) == "key_block.version"
    block = encoded(D_HEADER, AES_BDK, AES_KBPK[:16])
    assert refused(block, kbpk=AES_KBPK[:16], scheme=AES_DUKPT) == "kbpk"


@pytest.mark.parametrize("version", ["A", "C"])
def test_the_outdated_versions_are_refused_and_called_so(version: str) -> None:
    block = wrapped_by_psec(TDES_KBPK, f"{version}0000B0TX00E0000", BDK)
    with pytest.raises(InputError, match="outdated"):
        keyblock.unwrap_bdk(block, kbpk=TDES_KBPK, scheme=TDES_DUKPT)


@pytest.mark.parametrize("version", ["0", "E", "b", " "])
def test_a_version_that_nobody_knows_is_refused(version: str) -> None:
    block = b_block()
    assert refused(version + block[1:]) in {"key_block.version", "key_block"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda _: "B",
        lambda block: block[:15],
        lambda block: block[:16],
        lambda block: block[:-1],
        lambda block: block[:-2],
        lambda block: block + "00",
        lambda block: block * 100,
        lambda block: block[:1] + "0112" + block[5:],
        lambda block: block[:1] + " 096" + block[5:],
        lambda block: block[:1] + "+096" + block[5:],
        lambda block: block[:12] + "01" + block[14:],
        lambda block: block[:12] + "xx" + block[14:],
        lambda block: block[:20] + "  " + block[22:],
        lambda block: block[:20] + "\0\0" + block[22:],
        lambda block: block[:20] + "é" + block[21:],
        lambda block: block[:-2] + "zz",
        lambda block: block[:1] + "0016" + block[5:16],
        lambda block: block[:1] + "0032" + block[5:16] + "0" * 16,
        lambda block: block[:1] + "9999" + block[5:].ljust(9998, "0"),
        lambda block: block[:1] + "0096" + block[5:12] + "99" + block[14:],
    ],
    ids=range(21),
)
def test_a_damaged_block_is_refused_as_damaged(damage: Callable[[str], str]) -> None:
    assert refused(damage(b_block())) in {"key_block", "kbpk"}


@pytest.mark.parametrize(
    ("blocks", "field"),
    [
        (("KC0C00000000",), "key_block"),
        (("KC0C01000000",), "key_block"),
        (("KP0C00000000",), "kbpk"),
        (("KP0C01000000",), "kbpk"),
    ],
)
def test_a_check_value_in_the_block_that_does_not_fit_is_refused(
    blocks: tuple[str, ...], field: str
) -> None:
    assert refused(b_block(blocks=blocks)) == field
    assert refused(d_block(blocks=blocks), kbpk=AES_KBPK, scheme=AES_DUKPT) == field


def test_a_block_that_names_one_thing_twice_still_has_the_key_that_its_mac_is_over() -> None:
    block = b_block(blocks=("KS0800AA", "KS0800BB"))
    assert keyblock.unwrap_bdk(block, kbpk=TDES_KBPK, scheme=TDES_DUKPT) == BDK


@pytest.mark.parametrize("version", ["B", "D"])
def test_each_character_of_a_block_is_vouched_for(version: str) -> None:
    good, kbpk, scheme, key = {
        "B": (b_block(), TDES_KBPK, TDES_DUKPT, BDK),
        "D": (d_block(), AES_KBPK, AES_DUKPT, AES_BDK),
    }[version]
    for at, before in enumerate(good):
        for after in {"0", "F", "f", "X", " "} - {before, before.lower()}:
            changed = good[:at] + after + good[at + 1 :]
            if changed.upper() != good:
                assert refused(changed, kbpk=kbpk, scheme=scheme).startswith(("key_block", "kbpk"))
    assert keyblock.unwrap_bdk(good, kbpk=kbpk, scheme=scheme) == key


@given(data=st.data())
def test_whatever_character_is_changed_no_other_key_comes_out(data: st.DataObject) -> None:
    good, kbpk, scheme, key = data.draw(
        st.sampled_from(
            [
                (b_block(), TDES_KBPK, TDES_DUKPT, BDK),
                (d_block(blocks=("KS1800604B120F9292800000",)), AES_KBPK, AES_DUKPT, AES_BDK),
            ]
        )
    )
    at = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(1, 4))
    other = data.draw(
        st.text(min_size=0, max_size=4) | st.from_regex(r"[0-9A-F]{4}", fullmatch=True)
    )
    changed = good[:at] + other + good[at + length :]
    try:
        found = keyblock.unwrap_bdk(changed, kbpk=kbpk, scheme=scheme)
    except InputError:
        return
    assert found == key
    assert "".join(changed.split()).upper() == good.upper()


@given(block=st.text(max_size=200) | st.from_regex(r"[BD][0-9]{4}B0[AT]X00E[0-9]{4}.{0,80}"))
def test_whatever_comes_is_an_input_error_and_nothing_else(block: str) -> None:
    for scheme, kbpk in ((TDES_DUKPT, TDES_KBPK), (AES_DUKPT, AES_KBPK)):
        with pytest.raises(InputError):
            keyblock.unwrap_bdk(block, kbpk=kbpk, scheme=scheme)


# ---- what comes in


@pytest.mark.parametrize("kbpk", [TDES_KBPK, TDES_KBPK + bytes(range(1, 9))])
def test_a_tdes_key_comes_out_of_a_block_of_version_b(kbpk: bytes) -> None:
    for block in (wrapped_by_psec(kbpk, B_HEADER, BDK), encoded(B_HEADER, BDK, kbpk)):
        assert keyblock.unwrap_bdk(block, kbpk=kbpk, scheme=TDES_DUKPT) == BDK
        assert keyblock.protection_scheme(block) == TDES_DUKPT


@pytest.mark.parametrize("length", [16, 24, 32])
def test_an_aes_key_comes_out_of_a_block_of_version_d(length: int) -> None:
    kbpk, key = AES_KBPK[:length], AES_BDK[:length]
    for block in (wrapped_by_psec(kbpk, D_HEADER, key), encoded(D_HEADER, key, kbpk)):
        assert keyblock.unwrap_bdk(block, kbpk=kbpk, scheme=AES_DUKPT) == key
        assert keyblock.protection_scheme(block) == AES_DUKPT


def test_a_tdes_key_may_be_protected_by_aes() -> None:
    block = encoded("D0000B0TX00N0000", BDK, AES_KBPK[:16], hide_bytes=30)
    assert keyblock.unwrap_bdk(block, kbpk=AES_KBPK[:16], scheme=TDES_DUKPT) == BDK


@pytest.mark.parametrize("exportability", ["E", "N", "S"])
def test_exportability_and_optional_blocks_are_taken_as_they_come(exportability: str) -> None:
    header = f"B0000B0TX00{exportability}0000"
    blocks = ("KS1800604B120F9292800000", "HM0621", "99080000", "KC0C0008D7B4", "KC060Z")[:4]
    assert (
        keyblock.unwrap_bdk(
            b_block(header=header, blocks=blocks), kbpk=TDES_KBPK, scheme=TDES_DUKPT
        )
        == BDK
    )


def test_the_check_values_that_a_block_gives_are_known_in_both_ways_to_make_them() -> None:
    said = {
        "00": Cipher(AES(AES_BDK), modes.ECB()).encryptor().update(bytes(16)),
        "01": mac_of("D", AES_BDK, bytes(16)),
        "02": b"\xff" * 16,
    }
    for method, value in said.items():
        block = d_block(blocks=(f"KC10{method}{value[:5].hex().upper()}",))
        assert keyblock.unwrap_bdk(block, kbpk=AES_KBPK, scheme=AES_DUKPT) == AES_BDK
    value = mac_of("B", TDES_KBPK, bytes(8))
    block = b_block(blocks=("KP10" + "01" + value[:5].hex().upper(),))
    assert keyblock.unwrap_bdk(block, kbpk=TDES_KBPK, scheme=TDES_DUKPT) == BDK


def test_a_file_with_line_ends_in_it_is_read() -> None:
    block = b_block()
    wrapped = f"{block[:64]}\r\n{block[64:]}\n"
    assert keyblock.unwrap_bdk(wrapped, kbpk=TDES_KBPK, scheme=TDES_DUKPT) == BDK
