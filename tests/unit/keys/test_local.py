"""The provider `local`: which files it refuses, and what a wrapped key is bound to."""

import os
import stat
from pathlib import Path

import pytest

from glamd.errors import ConfigError, CryptoError
from glamd.keys.providers.local import SETTING, LocalProvider, create_kek_file

KEK = bytes(range(32))
KEY = b"\xa5" * 32


def kek_file(
    directory: Path, content: bytes = KEK.hex().encode() + b"\n", mode: int = 0o600
) -> Path:
    path = directory / "kek"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o440, 0o700, 0o777, 0o4600])
def test_a_kek_file_with_any_other_mode_is_refused_with_its_remedy(
    tmp_path: Path, mode: int
) -> None:
    path = kek_file(tmp_path, mode=mode)
    with pytest.raises(ConfigError, match=f"chmod 0600 {path}") as raised:
        LocalProvider(path)
    assert [error.field for error in raised.value.fields] == [SETTING]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_kek_file_is_refused(tmp_path: Path) -> None:
    path = kek_file(tmp_path)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="chown"):
        LocalProvider(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        KEK[:31],
        KEK + b"\n",
        KEK.hex().encode()[:63],
        KEK.hex().encode() + b"00",
        b"zz" * 32,
        KEK.hex().encode() * 100,
        bytes(32),
        b"00" * 32,
    ],
)
def test_a_file_that_holds_no_key_is_refused_without_being_quoted(
    tmp_path: Path, content: bytes
) -> None:
    path = kek_file(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        LocalProvider(path)
    assert "0001020304" not in str(raised.value)
    assert "zz" not in str(raised.value).replace(str(path), "")


def test_a_missing_kek_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        LocalProvider(tmp_path / "kek")


def test_a_pipe_or_a_directory_in_its_place_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        LocalProvider(pipe)
    with pytest.raises(ConfigError, match="not a regular file"):
        LocalProvider(tmp_path)


async def test_a_wrapped_key_opens_under_its_own_name_only(tmp_path: Path) -> None:
    provider = LocalProvider(kek_file(tmp_path))
    wrapped = await provider.wrap(KEY, context="bdk:shop-1")
    assert await provider.unwrap(wrapped, context="bdk:shop-1") == KEY
    with pytest.raises(CryptoError, match="bdk:shop-2 does not open"):
        await provider.unwrap(wrapped, context="bdk:shop-2")


async def test_a_damaged_wrapped_key_does_not_open(tmp_path: Path) -> None:
    provider = LocalProvider(kek_file(tmp_path))
    wrapped = await provider.wrap(KEY, context="c")
    for position in range(len(wrapped)):
        damaged = bytearray(wrapped)
        damaged[position] ^= 1
        with pytest.raises(CryptoError):
            await provider.unwrap(bytes(damaged), context="c")
    for length in range(len(wrapped)):
        with pytest.raises(CryptoError):
            await provider.unwrap(wrapped[:length], context="c")


async def test_another_kek_opens_nothing(tmp_path: Path) -> None:
    wrapped = await LocalProvider(kek_file(tmp_path)).wrap(KEY, context="c")
    other = LocalProvider(kek_file(tmp_path, bytes(range(1, 33))))
    with pytest.raises(CryptoError, match="does not open under this key-encryption key"):
        await other.unwrap(wrapped, context="c")


async def test_raw_bytes_and_hexadecimals_are_the_same_key(tmp_path: Path) -> None:
    wrapped = await LocalProvider(kek_file(tmp_path, KEK)).wrap(KEY, context="c")
    again = LocalProvider(kek_file(tmp_path, KEK.hex().upper().encode(), mode=0o400))
    assert await again.unwrap(wrapped, context="c") == KEY


async def test_the_same_key_wraps_to_different_bytes_each_time(tmp_path: Path) -> None:
    provider = LocalProvider(kek_file(tmp_path))
    wrapped = {await provider.wrap(KEY, context="c") for _ in range(10)}
    assert len(wrapped) == 10
    assert not any(KEY in one for one in wrapped)


@pytest.mark.skipif(os.geteuid() != 0, reason="systemd's credentials are root's")
def test_a_systemd_credential_may_show_the_mask_of_its_access_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kek_file(tmp_path, mode=0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    LocalProvider(path)
    path.chmod(0o444)
    with pytest.raises(ConfigError):
        LocalProvider(path)


async def test_it_is_healthy_and_shows_no_key(tmp_path: Path) -> None:
    provider = LocalProvider(kek_file(tmp_path))
    await provider.health()
    assert provider.name == "local"
    assert "masked" in repr(provider)


def test_a_made_kek_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    old_umask = os.umask(0)
    try:
        create_kek_file(path)
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made = path.read_bytes()
    create_kek_file(path)
    assert path.read_bytes() == made
    assert list(tmp_path.iterdir()) == [path]
    LocalProvider(path)


def test_a_kek_file_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        create_kek_file(tmp_path / "nowhere" / "kek")
