"""The two MACs: the standards' own values first, then lengths and the comparison."""

import hmac
from types import SimpleNamespace

import pytest

from glamd.crypto import mac
from glamd.crypto.mac import AES_CMAC, RETAIL_MAC
from glamd.errors import InputError

DEA_KEY = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
AES_128_KEY = bytes.fromhex("2B7E151628AED2A6ABF7158809CF4F3C")
AES_256_KEY = bytes.fromhex("603DEB1015CA71BE2B73AEF0857D77811F352C073B6108D72D9810A30914DFF4")
MESSAGE = bytes.fromhex(
    "6BC1BEE22E409F96E93D7E117393172AAE2D8A571E03AC9C9EB76FAC45AF8E51"
    "30C81C46A35CE411E5FBC1191A0A52EFF69F2445DF4F9B17AD2B417BE66C3710"
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"Now is the time for all ", "A1C72E74EA3FA9B6"),
        (b"Now is the time for it", "2E2B1428CC78254F"),
    ],
)
def test_iso_9797_1_algorithm_3_with_padding_1_as_in_its_annex(
    message: bytes, expected: str
) -> None:
    assert RETAIL_MAC.generate(DEA_KEY, message, length_bytes=8).hex().upper() == expected
    assert RETAIL_MAC.generate(DEA_KEY, message, length_bytes=4).hex().upper() == expected[:8]


@pytest.mark.parametrize(
    ("key", "length", "expected"),
    [
        (AES_128_KEY, 0, "BB1D6929E95937287FA37D129B756746"),
        (AES_128_KEY, 16, "070A16B46B4D4144F79BDD9DD04A287C"),
        (AES_128_KEY, 40, "DFA66747DE9AE63030CA32611497C827"),
        (AES_128_KEY, 64, "51F0BEBF7E3B9D92FC49741779363CFE"),
        (AES_256_KEY, 0, "028962F61B7BF89EFC6B551F4667D983"),
        (AES_256_KEY, 16, "28A7023F452E8F82BD4BF28D8C37C35C"),
        (AES_256_KEY, 64, "E1992190549F6ED5696A2C056C315410"),
    ],
)
def test_cmac_as_in_rfc_4493_and_sp_800_38b(key: bytes, length: int, expected: str) -> None:
    message = MESSAGE[:length]
    assert AES_CMAC.generate(key, message, length_bytes=16).hex().upper() == expected
    assert AES_CMAC.generate(key, message, length_bytes=8).hex().upper() == expected[:16]


@pytest.mark.parametrize(
    ("algorithm", "key", "lengths"),
    [(RETAIL_MAC, DEA_KEY, {4, 8}), (AES_CMAC, AES_128_KEY, {8, 16})],
)
def test_a_mac_of_another_length_is_neither_made_nor_taken(
    algorithm: mac.MacAlgorithm, key: bytes, lengths: set[int]
) -> None:
    whole = algorithm.compute(key, MESSAGE)
    for length in range(20):
        if length in lengths:
            made = algorithm.generate(key, MESSAGE, length_bytes=length)
            assert algorithm.verify(key, MESSAGE, made)
            assert not algorithm.verify(key, MESSAGE + b"\1", made)
            continue
        assert not algorithm.verify(key, MESSAGE, whole.ljust(20, b"\0")[:length])
        with pytest.raises(InputError):
            algorithm.generate(key, MESSAGE, length_bytes=length)


def test_padding_1_does_not_tell_trailing_zeros_apart() -> None:
    """A known weakness of the method; the ciphertexts it is used on are whole blocks anyway."""
    longer = b"1234567\0"
    assert RETAIL_MAC.compute(DEA_KEY, b"1234567") == RETAIL_MAC.compute(DEA_KEY, longer)
    assert RETAIL_MAC.compute(DEA_KEY, b"") == RETAIL_MAC.compute(DEA_KEY, bytes(8))


@pytest.mark.parametrize(("algorithm", "key"), [(RETAIL_MAC, DEA_KEY), (AES_CMAC, AES_128_KEY)])
def test_macs_are_compared_in_constant_time(
    algorithm: mac.MacAlgorithm, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return hmac.compare_digest(ours, theirs)

    monkeypatch.setattr(mac, "hmac", SimpleNamespace(compare_digest=compare_digest))
    right = algorithm.compute(key, MESSAGE)[:8]
    assert algorithm.verify(key, MESSAGE, right)
    assert not algorithm.verify(key, MESSAGE, bytes(8))
    assert compared == [(right, right), (right, bytes(8))]
