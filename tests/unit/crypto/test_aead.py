"""Sealing: every way in which sealed bytes can be wrong, then that right ones open."""

import pytest

from glamd.crypto.aead import KEY_BYTES, Sealer, open_sealed, seal
from glamd.errors import CryptoError

KEY = bytes(range(KEY_BYTES))
ROW = b"payment-tokens|v1|ptk_1"
CLEAR = b"4012345678909"


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(CryptoError):
        Sealer(bytes(length))
    with pytest.raises(CryptoError):
        seal(bytes(length), CLEAR, associated_data=ROW)
    with pytest.raises(CryptoError):
        open_sealed(bytes(length), bytes(40), associated_data=ROW)


def test_a_change_of_any_single_bit_is_noticed() -> None:
    sealed = seal(KEY, CLEAR, associated_data=ROW)
    for at in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[at] ^= 1 << bit
            with pytest.raises(CryptoError):
                open_sealed(KEY, bytes(damaged), associated_data=ROW)


def test_cut_at_any_place_it_does_not_open() -> None:
    sealed = seal(KEY, CLEAR, associated_data=ROW)
    for length in range(len(sealed)):
        with pytest.raises(CryptoError):
            open_sealed(KEY, sealed[:length], associated_data=ROW)
    with pytest.raises(CryptoError):
        open_sealed(KEY, sealed + b"\0", associated_data=ROW)


@pytest.mark.parametrize("other", [b"", b"payment-tokens|v1|ptk_2", b"payment-tokens|v2|ptk_1"])
def test_moved_to_another_row_it_does_not_open(other: bytes) -> None:
    sealed = seal(KEY, CLEAR, associated_data=ROW)
    with pytest.raises(CryptoError) as caught:
        open_sealed(KEY, sealed, associated_data=other)
    assert caught.value.__cause__ is None


def test_under_another_key_it_does_not_open() -> None:
    sealed = seal(KEY, CLEAR, associated_data=ROW)
    with pytest.raises(CryptoError):
        open_sealed(KEY[::-1], sealed, associated_data=ROW)


def test_the_published_gcm_vector_for_256_bits_opens() -> None:
    """McGrew and Viega, "The Galois/Counter Mode of Operation", test case 14."""
    sealed = bytes(12) + bytes.fromhex(
        "CEA7403D4D606B6E074EC5D3BAF39D18D0D1C8A799996BF0265B98B5D48AB919"
    )
    assert open_sealed(bytes(32), sealed, associated_data=b"") == bytes(16)


@pytest.mark.parametrize("clear", [b"", b"x", CLEAR, bytes(5000)])
def test_what_was_sealed_opens_into_a_buffer_of_ones_own(clear: bytes) -> None:
    sealer = Sealer(bytearray(KEY))
    sealed = sealer.seal(bytearray(clear), associated_data=ROW)
    assert len(sealed) == 12 + len(clear) + 16
    for opened in (
        sealer.open_sealed(sealed, associated_data=ROW),
        open_sealed(KEY, sealed, associated_data=ROW),
    ):
        assert isinstance(opened, bytearray)
        assert opened == clear


def test_the_same_thing_sealed_twice_looks_different_every_time() -> None:
    sealer = Sealer(KEY)
    sealed = [sealer.seal(CLEAR, associated_data=ROW) for _ in range(200)]
    assert len({one[:12] for one in sealed}) == len(sealed), "a nonce came twice"
    assert len(set(sealed)) == len(sealed)


def test_neither_a_sealer_nor_a_refusal_shows_key_or_content() -> None:
    sealer = Sealer(KEY)
    assert repr(sealer) == "<Sealer, key masked>"
    with pytest.raises(CryptoError) as caught:
        sealer.open_sealed(CLEAR * 4, associated_data=ROW)
    assert CLEAR.decode() not in str(caught.value)
