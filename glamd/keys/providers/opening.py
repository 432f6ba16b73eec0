"""Key providers out of what the configuration says, with what is missing named all at once.

The providers with dependencies of their own are imported here, and only when they are named. What
a provider does stands in its own file; reading the configuration is for `glamd.config`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from glamd.errors import ConfigError, CryptoError, FieldError, UnavailableError
from glamd.keys.providers.interface import KeyProvider, ProviderName, Providers
from glamd.keys.providers.local import LocalProvider

KEK_LABEL: Final = "glamd-kek"

NEEDED: Final[Mapping[ProviderName, tuple[str, ...]]] = {
    "local": ("kek_file",),
    "aws-kms": ("kms_key_id",),
    "pkcs11": ("pkcs11_module", "pkcs11_token_label", "pkcs11_pin_file"),
}
"""The settings of `[keys]` that a provider cannot do without."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSettings:
    """The settings of `[keys]` that are about providers, by the names that they have there.

    `former_providers` are those that wrapped keys which are not rewrapped yet.
    """

    provider: ProviderName = "local"
    former_providers: Sequence[ProviderName] = ()
    kek_file: Path | None = None
    former_kek_files: Sequence[Path] = ()
    kms_key_id: str | None = None
    bdk_kms_key_id: str | None = None
    former_kms_key_ids: Sequence[str] = ()
    kms_region: str | None = None
    kms_endpoint_url: str | None = None
    pkcs11_module: Path | None = None
    pkcs11_token_label: str | None = None
    pkcs11_pin_file: Path | None = None
    pkcs11_kek_label: str = KEK_LABEL


async def open_providers(settings: ProviderSettings) -> Providers:
    """Every provider that is named, the current one tried.

    One that is away is logged, for it may come back; ConfigError where a setting is missing or
    wrong, a package is not installed, or the current provider refuses.
    """
    providers = build_providers(settings)
    try:
        await providers.current.health()
    except UnavailableError as error:
        log.warning("key_provider_away", provider=settings.provider, reason=error.message)
    except CryptoError as error:
        await providers.close()
        fields = error.fields or (FieldError("keys.provider", error.message),)
        raise ConfigError(f"The keys cannot be used: {error.message}.", fields=fields) from None
    except BaseException:
        await providers.close()
        raise
    return providers


def build_providers(settings: ProviderSettings) -> Providers:
    """The providers without asking them anything; ConfigError as `open_providers`."""
    names = (settings.provider, *settings.former_providers)
    missing = [field for name in dict.fromkeys(names) for field in _missing(name, settings)]
    if len(set(names)) < len(names):
        message = "names a provider twice; former keys of one provider have settings of their own"
        missing.append(FieldError("keys.former_providers", message))
    if missing:
        shown = "; ".join(f"{field.field}: {field.message}" for field in missing)
        raise ConfigError(f"The key provider cannot be opened: {shown}.", fields=missing)
    current, *former = (_BUILD[name](settings) for name in names)
    return Providers(current, former=former)


def _missing(name: ProviderName, settings: ProviderSettings) -> list[FieldError]:
    return [
        FieldError(f"keys.{setting}", f"is required by the key provider {name}")
        for setting in NEEDED[name]
        if not getattr(settings, setting)
    ]


def _local(settings: ProviderSettings) -> KeyProvider:
    assert settings.kek_file is not None, "looked after by _missing"
    return LocalProvider(settings.kek_file, former=settings.former_kek_files)


def _aws_kms(settings: ProviderSettings) -> KeyProvider:
    try:
        from glamd.keys.providers.aws_kms import (  # noqa: PLC0415 - a dependency of its own
            AwsKmsProvider,
            KmsSettings,
        )
    except ImportError:
        raise _not_installed("aws-kms", "aws") from None
    assert settings.kms_key_id is not None, "looked after by _missing"
    return AwsKmsProvider(
        KmsSettings(
            key_id=settings.kms_key_id,
            bdk_key_id=settings.bdk_kms_key_id,
            former_key_ids=settings.former_kms_key_ids,
            region=settings.kms_region,
            endpoint_url=settings.kms_endpoint_url,
        )
    )


def _pkcs11(settings: ProviderSettings) -> KeyProvider:
    try:
        from glamd.keys.providers.hsm import (  # noqa: PLC0415 - a dependency of its own
            TokenAddress,
        )
        from glamd.keys.providers.pkcs11 import (  # noqa: PLC0415 - a dependency of its own
            Pkcs11Provider,
        )
    except ImportError:
        raise _not_installed("pkcs11", "hsm") from None
    module, pin_file = settings.pkcs11_module, settings.pkcs11_pin_file
    label = settings.pkcs11_token_label
    assert module is not None, "looked after by _missing"
    assert pin_file is not None, "looked after by _missing"
    assert label is not None, "looked after by _missing"
    address = TokenAddress(module=module, token_label=label, pin_file=pin_file)
    return Pkcs11Provider(address, kek_label=settings.pkcs11_kek_label)


_BUILD: Final = {"local": _local, "aws-kms": _aws_kms, "pkcs11": _pkcs11}


def _not_installed(name: ProviderName, extra: str) -> ConfigError:
    message = f"{name} needs packages that are not installed: pip install glamd[{extra}]"
    return ConfigError(
        f"The key provider {message}.", fields=(FieldError("keys.provider", message),)
    )
