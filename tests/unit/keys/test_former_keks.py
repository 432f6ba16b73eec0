"""The provider `local` with several KEK files: the first wraps, all unwrap."""

from pathlib import Path

import pytest

from glamd.errors import CryptoError
from glamd.keys.providers.local import LocalProvider, create_kek_file

KEY = b"\xa5" * 32
NAME = "payment-tokens:v1"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        create_kek_file(path)
    return paths


async def test_what_no_kek_of_the_several_wrapped_does_not_open(files: list[Path]) -> None:
    wrapped = await LocalProvider(files[2]).wrap(KEY, context=NAME)
    provider = LocalProvider(files[0], former=files[1:2])
    with pytest.raises(CryptoError, match="payment-tokens:v1 does not open"):
        await provider.unwrap(wrapped, context=NAME)


async def test_the_name_is_bound_under_a_former_kek_too(files: list[Path]) -> None:
    wrapped = await LocalProvider(files[1]).wrap(KEY, context=NAME)
    with pytest.raises(CryptoError):
        await LocalProvider(files[0], former=files[1:]).unwrap(wrapped, context="audit:v1")


async def test_the_first_wraps_and_a_former_one_only_opens(files: list[Path]) -> None:
    former = await LocalProvider(files[1]).wrap(KEY, context=NAME)
    provider = LocalProvider(files[0], former=files[1:])
    assert await provider.unwrap(former, context=NAME) == KEY
    assert not await provider.is_current(former, context=NAME)
    made = await provider.wrap(KEY, context=NAME)
    assert await provider.is_current(made, context=NAME)
    assert await LocalProvider(files[0]).unwrap(made, context=NAME) == KEY
