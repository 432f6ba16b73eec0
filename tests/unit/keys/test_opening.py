"""Key providers out of settings: what is missing is named at once, who is away is waited for."""

import sys
from pathlib import Path

import pytest
import structlog

from glamd.errors import ConfigError, CryptoError, UnavailableError
from glamd.keys.providers import opening
from glamd.keys.providers.interface import ProviderName
from glamd.keys.providers.local import LocalProvider, create_kek_file
from glamd.keys.providers.opening import ProviderSettings, build_providers, open_providers


@pytest.fixture
def kek(tmp_path: Path) -> Path:
    create_kek_file(tmp_path / "kek")
    return tmp_path / "kek"


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (ProviderSettings(), ["keys.kek_file"]),
        (ProviderSettings(provider="aws-kms"), ["keys.kms_key_id"]),
        (
            ProviderSettings(provider="pkcs11", former_providers=("local",)),
            [
                "keys.pkcs11_module",
                "keys.pkcs11_token_label",
                "keys.pkcs11_pin_file",
                "keys.kek_file",
            ],
        ),
        (
            ProviderSettings(kek_file=Path("kek"), former_providers=("local",)),
            ["keys.former_providers"],
        ),
    ],
)
def test_every_missing_setting_is_named_at_once(
    settings: ProviderSettings, fields: list[str]
) -> None:
    with pytest.raises(ConfigError, match=fields[0]) as raised:
        build_providers(settings)
    assert [error.field for error in raised.value.fields] == fields


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("aws-kms", "aioboto3", "aws"), ("pkcs11", "pkcs11", "hsm")]
)
def test_a_provider_whose_packages_are_missing_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: ProviderName, package: str, extra: str
) -> None:
    for module in ("aws_kms", "pkcs11", "hsm"):
        monkeypatch.delitem(sys.modules, f"glamd.keys.providers.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    settings = ProviderSettings(
        provider=name,
        kms_key_id="alias/glamd",
        pkcs11_module=tmp_path,
        pkcs11_token_label="glamd",
        pkcs11_pin_file=tmp_path,
    )
    with pytest.raises(ConfigError, match=rf"pip install glamd\[{extra}\]") as raised:
        build_providers(settings)
    assert [error.field for error in raised.value.fields] == ["keys.provider"]


def test_a_former_kek_file_with_a_loose_mode_is_refused_under_its_own_setting(
    kek: Path, tmp_path: Path
) -> None:
    former = tmp_path / "former"
    create_kek_file(former)
    former.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 0600 {former}") as raised:
        build_providers(ProviderSettings(kek_file=kek, former_kek_files=(former,)))
    assert [error.field for error in raised.value.fields] == ["keys.former_kek_files"]


async def test_local_needs_neither_of_the_other_providers_packages(
    monkeypatch: pytest.MonkeyPatch, kek: Path
) -> None:
    for package in ("aioboto3", "botocore", "pkcs11"):
        monkeypatch.setitem(sys.modules, package, None)
    providers = await open_providers(ProviderSettings(kek_file=kek))
    assert providers.current.name == "local"
    await providers.close()


class Troubled(LocalProvider):
    """A provider whose health is an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.closed = False

    async def health(self) -> None:
        raise self._error

    async def close(self) -> None:
        self.closed = True


async def test_a_provider_that_is_away_at_the_start_is_logged_and_kept(
    monkeypatch: pytest.MonkeyPatch, kek: Path
) -> None:
    troubled = Troubled(UnavailableError("It is away."))
    monkeypatch.setitem(opening._BUILD, "local", lambda _settings: troubled)
    with structlog.testing.capture_logs() as logs:
        providers = await open_providers(ProviderSettings(kek_file=kek))
    assert [entry["event"] for entry in logs] == ["key_provider_away"]
    assert not troubled.closed
    with pytest.raises(UnavailableError, match="It is away"):
        await providers.health()


@pytest.mark.parametrize("error", [CryptoError("the key is disabled"), ConfigError("No region.")])
async def test_a_provider_that_refuses_at_the_start_ends_it(
    monkeypatch: pytest.MonkeyPatch, kek: Path, error: Exception
) -> None:
    troubled = Troubled(error)
    monkeypatch.setitem(opening._BUILD, "local", lambda _settings: troubled)
    with pytest.raises(ConfigError, match=r"the key is disabled|No region"):
        await open_providers(ProviderSettings(kek_file=kek))
    assert troubled.closed
