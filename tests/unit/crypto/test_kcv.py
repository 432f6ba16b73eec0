"""Key check values: published ones, and the refusal of keys that cannot be."""

import pytest

from glamd.crypto import kcv
from glamd.crypto.blocks import encrypt_aes
from glamd.errors import InputError


@pytest.mark.parametrize("length", [0, 8, 15, 17, 32])
def test_a_tdes_key_of_another_length_has_none(length: int) -> None:
    with pytest.raises(InputError) as caught:
        kcv.tdes(b"\xab" * length)
    assert "ab" * 4 not in repr(caught.value).lower()


@pytest.mark.parametrize("length", [0, 8, 15, 17, 33])
def test_an_aes_key_of_another_length_has_none(length: int) -> None:
    with pytest.raises(InputError):
        kcv.aes(bytes(length))


def test_the_public_test_key_has_its_well_known_value() -> None:
    key = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
    assert kcv.tdes(key).hex().upper() == "08D7B4"
    assert kcv.tdes(key + key[:8]) == kcv.tdes(key), "K1 K2 K1 is the same key"


@pytest.mark.parametrize("length", [16, 24, 32])
def test_for_aes_it_is_the_cmac_of_a_block_of_zeros(length: int) -> None:
    """Computed after SP 800-38B, 6.1 and 6.2, without a CMAC: E(K1), where K1 doubles E(0)."""
    key = bytes(range(length))
    zero = int.from_bytes(encrypt_aes(key, bytes(16)), "big")
    doubled = (zero << 1 & (1 << 128) - 1) ^ (0x87 if zero >> 127 else 0)
    assert kcv.aes(key) == encrypt_aes(key, doubled.to_bytes(16, "big"))[:3]
    assert kcv.aes(key) != encrypt_aes(key, bytes(16))[:3], "not the legacy value"
