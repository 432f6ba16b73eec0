"""What can be set of keys, card data and audit: mistakes first, each told with its key."""

from pathlib import Path

import pytest

from glamd.config import Settings, check_files, load
from glamd.errors import ConfigError
from tests.unit.test_config import NEEDED


def settings(**environ: str) -> Settings:
    return load(None, environ=NEEDED | environ)


def told(**environ: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        settings(**environ)
    return {mistake.field: mistake.message for mistake in raised.value.fields}


@pytest.mark.parametrize(
    ("provider", "missing"),
    [
        ("aws-kms", {"keys.kms_key_id"}),
        ("pkcs11", {"keys.pkcs11_module", "keys.pkcs11_token_label", "keys.pkcs11_pin_file"}),
    ],
)
@pytest.mark.parametrize("key", ["GLAMD_KEYS__PROVIDER", "GLAMD_KEYS__FORMER_PROVIDERS"])
def test_a_provider_without_what_it_needs_is_told_every_key_of_it(
    provider: str, missing: set[str], key: str
) -> None:
    mistakes = told(**{key: provider})
    assert set(mistakes) == missing
    for field, message in mistakes.items():
        variable = "GLAMD_KEYS__" + field.removeprefix("keys.").upper()
        assert message.endswith(
            f"is required by the key provider {provider}; in the environment {variable}"
        )


def test_a_provider_that_there_is_not_is_told_with_those_there_are() -> None:
    mistakes = told(GLAMD_KEYS__PROVIDER="vault")
    assert "'local', 'aws-kms' or 'pkcs11'" in mistakes["keys.provider"]


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        (
            "GLAMD_KEYS__PAYMENT_TOKENS_CRYPTOPERIOD_DAYS",
            "0",
            "keys.payment_tokens_cryptoperiod_days",
        ),
        ("GLAMD_KEYS__RELOAD_S", "0", "keys.reload_s"),
        ("GLAMD_KEYS__ROTATE_AUTOMATICALLY", "perhaps", "keys.rotate_automatically"),
        ("GLAMD_KEYS__KMS_ENDPOINT_URL", "ftp://kms.example", "keys.kms_endpoint_url"),
        ("GLAMD_PAYMENTS__METADATA_DAYS", "0", "payments.metadata_days"),
        ("GLAMD_PAYMENTS__SHRED_WITHIN_H", "0.5", "payments.shred_within_h"),
        ("GLAMD_AUDIT__HEAD_EVERY_S", "0", "audit.head_every_s"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_key(variable: str, value: str, field: str) -> None:
    assert field in told(**{variable: value})


def test_the_older_name_of_the_key_for_bdks_is_used_with_the_provider_it_belongs_to() -> None:
    found = settings(
        GLAMD_KEYS__PROVIDER="aws-kms",
        GLAMD_KEYS__KMS_KEY_ID="alias/glamd",
        GLAMD_KEYS__KMS_REGION="eu-central-1",
        BDK_KMS_KEY_ID="alias/bdk",
    )
    assert found.keys.bdk_kms_key_id == "alias/bdk"
    assert found.warnings == ()


def test_every_former_key_file_is_looked_for_and_the_heads_file_is_not(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("x")
    files = {
        name: str(there) for name in NEEDED if name.endswith(("_CERT", "_KEY", "_CA", "_FILE"))
    }
    check_files(settings(**files, GLAMD_AUDIT__HEAD_FILE=str(tmp_path / "to-come")))
    gone = f"{there},{tmp_path / 'gone'}"
    with pytest.raises(ConfigError) as raised:
        check_files(settings(**files, GLAMD_KEYS__FORMER_KEK_FILES=gone))
    assert [mistake.field for mistake in raised.value.fields] == ["keys.former_kek_files[1]"]


def test_the_owner_of_the_tables_is_the_daemons_login_unless_said_otherwise() -> None:
    one = settings().database
    assert one.owner_url == one.cde_owner_url == one.url
    two = settings(GLAMD_DATABASE__OWNER_URL="postgresql://owner@db.example/glamd").database
    assert two.cde_owner_url == two.owner_url != two.url
    apart = settings(
        GLAMD_DATABASE__OWNER_URL="postgresql://owner@db.example/glamd",
        GLAMD_DATABASE__CDE_URL="postgresql://glamd@cde.example/cde",
    ).database
    assert apart.cde_owner_url == apart.cde_url
