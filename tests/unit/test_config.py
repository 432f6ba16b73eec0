"""Settings: every mistake at once, by its key and never its value; and where values come from."""

import json
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from glamd import config
from glamd.config import Settings, WorkerGrant, check_files, effective, from_values, load
from glamd.config_sources import LISTED_SECRETS, MAX_CONFIG_BYTES, MAX_SECRET_BYTES, SINGLE_SECRETS
from glamd.errors import ConfigError
from glamd.http.cors import Cors
from glamd.origins import MAX_ORIGINS

ETC = Path(__file__).parents[2] / "etc" / "glamd.toml"
SECRET = "correct-horse-battery-staple-0123456789"
OTHER = "another-secret-of-the-same-kind-9876543210"
TOO_MANY_ORIGINS = [f"https://shop-{n}.example" for n in range(MAX_ORIGINS + 1)]
NEEDED = {
    "GLAMD_DATABASE__URL": "postgresql://glamd:hunter2@db.example/glamd",
    "GLAMD_MQTT__TLS_CERT": "/etc/glamd/mqtt.crt",
    "GLAMD_MQTT__TLS_KEY": "/etc/glamd/mqtt.key",
    "GLAMD_MQTT__CLIENT_CA": "/etc/glamd/ca.crt",
    "GLAMD_DEVICES__CA_CERT": "/etc/glamd/ca.crt",
    "GLAMD_DEVICES__CA_KEY": "/etc/glamd/ca.key",
    "GLAMD_KEYS__KEK_FILE": "/etc/glamd/kek",
    "GLAMD_AUTH__CLIENT_SECRETS": SECRET,
    "GLAMD_AUTH__INTERNAL_SECRETS": OTHER,
}


def settings(**environ: str) -> Settings:
    return load(None, environ=NEEDED | environ)


def without(*names: str, **environ: str) -> dict[str, str]:
    return {name: value for name, value in (NEEDED | environ).items() if name not in names}


def mistakes(environ: Mapping[str, str], config_file: Path | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        load(config_file, environ=environ)
    assert "\n" not in raised.value.message
    for mistake in raised.value.fields:
        assert mistake.field in raised.value.message
        assert mistake.message in raised.value.message
    return {mistake.field: mistake.message for mistake in raised.value.fields}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "glamd.toml"
    path.write_text("")
    return path


# ---- mistakes


def test_every_mistake_of_every_source_is_told_at_once(toml: Path) -> None:
    toml.write_text('drain_timeout_s = "soon"\n[http]\nport = 70000\nprot = 1\n[htpp]\nhost = ""\n')
    environ = {
        "GLAMD_DATABASE__URL": "mysql://root:hunter2@db/x",
        "GLAMD_WORKER__ENABLED": "true",
        "GLAMD_WORKER__GRANTS": '[{"name": "w", "fields": ["cvv"], "purposes": []}]',
        "GLAMD_LOGGING__LEVEL": "loud",
        "GLAMD_NODE_ID": "a b",
        "CLIENT_JWT_SECRET": "short",
    }
    assert mistakes(environ, toml) == {
        "node_id": "should be 1 to 64 letters, digits, dots, underscores, hyphens"
        " (from GLAMD_NODE_ID)",
        "drain_timeout_s": "should be a number (from glamd.toml)",
        "database.url": "should be a URL that begins with postgresql:// (from GLAMD_DATABASE__URL)",
        "http.port": "should be at most 65535 (from glamd.toml)",
        "http.prot": "is not a setting; did you mean port? (from glamd.toml)",
        "worker.tls_cert": "is required, because worker.enabled is true",
        "worker.tls_key": "is required, because worker.enabled is true",
        "worker.client_ca": "is required, because worker.enabled is true",
        "worker.grants[0].purposes": "should not be empty (from GLAMD_WORKER__GRANTS)",
        "worker.grants[0].fields[0]": "should be 'pan', 'expiry', 'cardholder_name',"
        " 'service_code', 'track2' or 'emv' (from GLAMD_WORKER__GRANTS)",
        "worker.grants[0].merchants": "is required (from GLAMD_WORKER__GRANTS)",
        "mqtt.tls_cert": "is required; in the environment GLAMD_MQTT__TLS_CERT",
        "mqtt.tls_key": "is required; in the environment GLAMD_MQTT__TLS_KEY",
        "mqtt.client_ca": "is required; in the environment GLAMD_MQTT__CLIENT_CA",
        "devices.ca_cert": "is required; in the environment GLAMD_DEVICES__CA_CERT",
        "devices.ca_key": "is required; in the environment GLAMD_DEVICES__CA_KEY",
        "auth.client_secrets": "has a secret of less than 32 bytes (HS256)"
        " (from CLIENT_JWT_SECRET)",
        "auth.internal_secrets": "needs a secret in production, best as auth.internal_secrets_file,"
        " or keys in auth.internal_jwks_file",
        "keys.kek_file": "is required by the key provider local; in the environment"
        " GLAMD_KEYS__KEK_FILE",
        "logging.level": "should be 'debug', 'info', 'warning', 'error' or 'critical'"
        " (from GLAMD_LOGGING__LEVEL)",
        "htpp": "is not a setting; did you mean http? (from glamd.toml)",
    }


def test_no_mistake_repeats_a_value(toml: Path) -> None:
    toml.write_text(
        '[auth]\nclient_secrets = ["hunter2"]\n[database]\nurl = 42\nhunter = "hunter2"'
    )
    environ = {
        "GLAMD_HTTP": "hunter2",
        "GLAMD_MQTT__PORT": "hunter2",
        "INTERNAL_JWT_SECRET": "hunter2",
    }
    with pytest.raises(ConfigError) as raised:
        load(toml, environ=environ)
    assert "hunter2" not in raised.value.message
    assert "hunter2" not in repr(raised.value.fields)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("GLAMD_HTTP__PORT", "-1", "http.port"),
        ("GLAMD_HTTP__PORT", "8080.5", "http.port"),
        ("GLAMD_HTTP__TRUSTED_PROXIES", "10.0.0.0/8,nonsense", "http.trusted_proxies[1]"),
        ("GLAMD_HTTP__RATE_LIMIT_PER_S", "nan", "http.rate_limit_per_s"),
        ("GLAMD_HTTP__RATE_LIMIT_PER_S", "0", "http.rate_limit_per_s"),
        ("GLAMD_HTTP__HOST", "0.0.0.0", "http.tls_cert"),
        ("GLAMD_HTTP__TLS_CERT", "/x.crt", "http.tls_key"),
        ("GLAMD_HTTP__TLS_KEY", "/x.key", "http.tls_key"),
        ("GLAMD_HTTP__PORT__X", "1", "http.port"),
        ("GLAMD_HTTP__", "1", "http."),
        ("GLAMD_", "1", ""),
        ("GLAMD_WORKER__GRANTS", "[", "worker.grants"),
        ("GLAMD_WORKER__GRANTS", "{}", "worker.grants"),
        ("GLAMD_AUTH__MAX_LIFETIME_H", "25", "auth.max_lifetime_h"),
        ("GLAMD_AUTH__CLIENT_SECRETS", '["', "auth.client_secrets"),
        ("GLAMD_DEVICES__STATUS_POLL_S", "5", "devices.status_poll_s"),
        ("GLAMD_HTTP__CORS_ORIGINS", "*", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "null", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "http://shop.example", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://shop.example/", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://a@shop.example", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://*.example", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://a_b.example", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://a.example:", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://a.example,https://", "http.cors_origins[1]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "https://[", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", "http://127.0.0.2", "http.cors_origins[0]"),
        ("GLAMD_HTTP__CORS_ORIGINS", ",".join(TOO_MANY_ORIGINS), "http.cors_origins"),
        ("GLAMD_CREDENTIALS__READERS", "a b", "credentials.readers[0]"),
        ("GLAMD_CREDENTIALS__OAUTH", "{}", "credentials.oauth"),
        ("GLAMD_CREDENTIALS__REFRESH_INTERVAL_S", "0", "credentials.refresh_interval_s"),
        ("SHOPIFY_API_SECRET", "shpss_x", "shopify.api_secrets"),
        ("GLAMD_KEYS__PROVIDER", "hsm", "keys.provider"),
        ("GLAMD_ENVIRONMENT", "prod", "environment"),
        ("APP_ENV", "moon", "environment"),
        ("DEFAULT_TOKEN_TTL_HOURS", "soon", "payments.default_token_ttl_h"),
        ("CURRENT_KEY_VERSION", "v 1", "keys.first_version"),
    ],
)
def test_a_wrong_value_is_told_by_its_key(name: str, value: str, field: str) -> None:
    assert list(mistakes(NEEDED | {name: value})) == [field]


@pytest.mark.parametrize(
    "origins",
    [
        [],
        ["https://shop.example:8443", "http://localhost:5173", "http://[::1]"],
        ["https://[2001:db8::1]:8443", "https://intranet", "https://192.0.2.1"],
        TOO_MANY_ORIGINS[:-1],
    ],
    ids=["none", "ports", "addresses", "many"],
)
def test_origins_that_are_taken_are_those_that_the_listener_takes(origins: list[str]) -> None:
    read = settings(GLAMD_HTTP__CORS_ORIGINS=json.dumps(origins)).http.cors_origins
    assert list(read) == origins
    Cors(read)


def grants(*given: dict[str, object]) -> dict[str, object]:
    minimal = {"name": "w", "purposes": ["p"], "fields": ["pan"], "merchants": "*"}
    return {"worker": {"grants": [minimal | grant for grant in given]}}


def nested(**sections: object) -> dict[str, object]:
    """The needed values as a program would give them."""
    values: dict[str, object] = {
        "database": {"url": "postgresql://glamd@localhost/glamd"},
        "mqtt": {"tls_cert": "/m.crt", "tls_key": "/m.key", "client_ca": "/ca.crt"},
        "devices": {"ca_cert": "/ca.crt", "ca_key": "/ca.key"},
        "auth": {"client_secrets": [SECRET], "internal_secrets": [OTHER]},
        "keys": {"kek_file": "/kek"},
    }
    return values | sections


def test_an_empty_list_of_merchants_is_not_every_merchant() -> None:
    with pytest.raises(ConfigError) as raised:
        from_values(nested(**grants({"merchants": []})))
    (mistake,) = raised.value.fields
    assert mistake.field == "worker.grants[0].merchants"
    assert "every merchant" in mistake.message


def test_a_worker_stands_in_one_grant_only() -> None:
    with pytest.raises(ConfigError, match="name each worker once"):
        from_values(nested(**grants({}, {"fields": ["expiry"]})))


def test_a_file_that_is_not_there_is_told_alone(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert mistakes({}, missing) == {str(missing): "cannot be read: No such file or directory"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[http\nport = 1", "is not TOML: "),
        (b"a = '\xff'", "is not UTF-8"),
        (b"#" * (MAX_CONFIG_BYTES + 1), "is larger than"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_told_alone(
    toml: Path, content: bytes, reason: str
) -> None:
    toml.write_bytes(content)
    told = mistakes({}, toml)
    assert list(told) == [str(toml)]
    assert told[str(toml)].startswith(reason)


def test_production_wants_long_secrets_and_development_does_not() -> None:
    short = NEEDED | {"GLAMD_AUTH__CLIENT_SECRETS": "x" * 31}
    assert list(mistakes(short)) == ["auth.client_secrets"]
    assert load(None, environ=NEEDED | {"GLAMD_AUTH__CLIENT_SECRETS": "ä" * 16})
    assert load(None, environ=short | {"GLAMD_ENVIRONMENT": "development"})
    no_secrets = without("GLAMD_AUTH__CLIENT_SECRETS", "GLAMD_AUTH__INTERNAL_SECRETS")
    assert list(mistakes(no_secrets)) == ["auth.client_secrets", "auth.internal_secrets"]
    assert load(None, environ=no_secrets | {"APP_ENV": "dev"}).auth.client_secrets == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    assert settings(GLAMD_HTTP__HOST=host).http.tls_cert is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "api.example", "localhost.example"])
def test_any_other_host_needs_tls(host: str) -> None:
    assert list(mistakes(NEEDED | {"GLAMD_HTTP__HOST": host})) == ["http.tls_cert"]
    with_tls = settings(
        GLAMD_HTTP__HOST=host, GLAMD_HTTP__TLS_CERT="/h.crt", GLAMD_HTTP__TLS_KEY="/h.key"
    )
    assert with_tls.http.tls_key == Path("/h.key")


def test_settings_and_their_sections_cannot_be_changed() -> None:
    loaded = settings()
    with pytest.raises(ValidationError, match="frozen"):
        loaded.http.__setattr__("port", 1)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.__setattr__("http", loaded.http)


def test_files_that_settings_name_are_checked_together(tmp_path: Path) -> None:
    there = tmp_path / "there.pem"
    there.write_text("pem")
    files = {
        name: str(there) for name in NEEDED if name.endswith(("_CERT", "_KEY", "_CA", "_FILE"))
    }
    check_files(settings(**files))
    broken = files | {"GLAMD_MQTT__TLS_KEY": str(tmp_path), "GLAMD_KEYS__KEK_FILE": "/nowhere/kek"}
    with pytest.raises(ConfigError) as raised:
        check_files(settings(**broken))
    assert [mistake.field for mistake in raised.value.fields] == ["mqtt.tls_key", "keys.kek_file"]


# ---- where values come from


def test_the_usual_file_is_taken_only_where_it_is_and_none_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = tmp_path / "usual.toml", tmp_path / "other.toml"
    monkeypatch.setattr(config, "DEFAULT_CONFIG_FILE", usual)
    assert config.file_of(None) is None
    usual.touch()
    assert config.file_of(None) == usual
    assert config.file_of(other) == other, "one that is missing is told, not replaced"


def test_a_name_of_the_development_command_is_not_a_mistake() -> None:
    assert settings(GLAMD_STATE_DIR="/var/tmp/x") == settings()


def test_defaults_hold_where_nothing_is_said() -> None:
    loaded = settings()
    assert loaded.environment == "production"
    assert loaded.node_id == socket.gethostname()[:64]
    assert loaded.drain_timeout_s == 20
    assert (loaded.http.host, loaded.http.port, loaded.mqtt.port) == ("127.0.0.1", 8080, 8883)
    assert loaded.database.cde_url == loaded.database.url
    assert loaded.devices.server_ca == loaded.devices.ca_cert
    assert loaded.warnings == ()


def test_the_environment_wins_over_the_file_and_a_file_of_its_own_over_both(
    toml: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://from-file/x\n")
    toml.write_text('[database]\nurl = "postgresql://toml/x"\npool_size = 3\n[http]\nport = 1\n')
    base = without("GLAMD_DATABASE__URL")
    assert url(load(toml, environ=base)) == "postgresql://toml/x"
    base["DATABASE_URL"] = "postgresql://older/x"
    assert url(load(toml, environ=base)) == "postgresql://older/x"
    base["GLAMD_DATABASE__URL"] = "postgresql://newer/x"
    assert url(load(toml, environ=base)) == "postgresql://newer/x"
    base["GLAMD_DATABASE__URL_FILE"] = str(secret)
    assert url(load(toml, environ=base)) == "postgresql://from-file/x"
    base["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    (tmp_path / "database.url").write_text("postgresql://credential/x")
    loaded = load(toml, environ=base | {"GLAMD_HTTP__PORT": "2"})
    assert url(loaded) == "postgresql://credential/x"
    assert (loaded.database.pool_size, loaded.http.port) == (3, 2)


def url(loaded: Settings) -> str:
    return loaded.database.url.get_secret_value()


def test_several_secrets_come_one_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "auth.client_secrets"
    file.write_text(f"{SECRET}\n\n{OTHER}\n")
    for place in (
        {"GLAMD_AUTH__CLIENT_SECRETS_FILE": str(file)},
        {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    ):
        loaded = load(None, environ=without("GLAMD_AUTH__CLIENT_SECRETS") | place)
        assert [s.get_secret_value() for s in loaded.auth.client_secrets] == [SECRET, OTHER]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its file is empty"),
        (b" \n\n", "its file is empty"),
        (b"postgresql://a/b\npostgresql://c/d", "its file should hold one line"),
        (b"\xff\xfe", "its file is not UTF-8"),
        (b"x" * (MAX_SECRET_BYTES + 1), "its file is larger than"),
        (None, "its file cannot be read: Is a directory"),
    ],
)
def test_a_broken_file_of_a_secret_is_told_once_with_its_name(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "database.url"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    base = without("GLAMD_DATABASE__URL")
    for place, name in (
        ({"GLAMD_DATABASE__URL_FILE": str(file)}, "database.url_file"),
        ({"CREDENTIALS_DIRECTORY": str(tmp_path)}, "credential database.url"),
    ):
        told = mistakes(base | place)
        assert list(told) == ["database.url"]
        assert told["database.url"].startswith(reason)
        assert told["database.url"].endswith(f"(from {name})")


def test_a_directory_of_credentials_may_hold_others_and_lack_ours(tmp_path: Path) -> None:
    (tmp_path / "kek").write_text("not a setting")
    assert settings(CREDENTIALS_DIRECTORY=str(tmp_path)).warnings == ()
    assert settings(CREDENTIALS_DIRECTORY=str(tmp_path / "none")).warnings == ()


def test_an_empty_variable_counts_as_absent() -> None:
    assert settings(GLAMD_HTTP__PORT="", DATABASE_URL=" ", APP_ENV="").http.port == 8080


def test_lists_in_the_environment_are_json_or_words_between_commas() -> None:
    for value in ("10.0.0.0/8, ::1", '["10.0.0.0/8", "::1"]'):
        networks = settings(GLAMD_HTTP__TRUSTED_PROXIES=value).http.trusted_proxies
        assert [str(network) for network in networks] == ["10.0.0.0/8", "::1/128"]


def test_a_secret_in_the_environment_may_hold_commas_and_several_stand_in_json() -> None:
    odd = "a,secret,with,commas,and,more,than,32,bytes"
    for name in ("GLAMD_AUTH__CLIENT_SECRETS", "CLIENT_JWT_SECRET"):
        base = without("GLAMD_AUTH__CLIENT_SECRETS")
        (secret,) = load(None, environ=base | {name: odd}).auth.client_secrets
        assert secret.get_secret_value() == odd
    both = settings(GLAMD_AUTH__CLIENT_SECRETS=f'["{SECRET}", "{OTHER}"]').auth.client_secrets
    assert both == (SecretStr(SECRET), SecretStr(OTHER))


def test_grants_come_from_the_environment_as_json() -> None:
    (grant,) = settings(
        GLAMD_WORKER__GRANTS='[{"name":"w","purposes":["refund"],"fields":["pan","expiry"],'
        '"merchants":["5f0c6f0e-8a4b-4c8e-9a3f-0d6f1c2b3a4d"]}]'
    ).worker.grants
    assert isinstance(grant, WorkerGrant)
    assert (grant.purposes, grant.fields) == (("refund",), ("pan", "expiry"))
    assert [str(merchant) for merchant in grant.merchants] == [
        "5f0c6f0e-8a4b-4c8e-9a3f-0d6f1c2b3a4d"
    ]


# ---- the older names


@pytest.mark.parametrize(
    ("environ", "path", "value"),
    [
        ({"APP_ENV": "Dev", "ENVIRONMENT": "production"}, "environment", "development"),
        ({"ENVIRONMENT": "staging"}, "environment", "production"),
        ({"DEBUG": "1"}, "logging.level", "debug"),
        ({"DEBUG": "True", "LOGGING_LEVEL": "WARN"}, "logging.level", "warning"),
        ({"DEBUG": "false"}, "logging.level", "info"),
        ({"LOGGING_LEVEL": "ERROR"}, "logging.level", "error"),
        ({"DEFAULT_TOKEN_TTL_HOURS": "48"}, "payments.default_token_ttl_h", 48.0),
        ({"CURRENT_KEY_VERSION": "v7"}, "keys.first_version", "v7"),
        ({"TOKEN_ENCRYPTION_KEY_ID": "key-2024"}, "keys.first_version", "key-2024"),
        ({"APP_ENV": "dev", "GLAMD_ENVIRONMENT": "production"}, "environment", "production"),
    ],
)
def test_an_older_name_still_works(environ: dict[str, str], path: str, value: object) -> None:
    found: object = settings(**environ)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_older_secrets_and_a_url_of_sqlalchemys_kind_still_work() -> None:
    base = without(
        "GLAMD_DATABASE__URL", "GLAMD_AUTH__CLIENT_SECRETS", "GLAMD_AUTH__INTERNAL_SECRETS"
    )
    loaded = load(
        None,
        environ=base
        | {
            "DATABASE_URL": "postgresql+asyncpg://u:p@h/d",
            "CLIENT_JWT_SECRET": SECRET,
            "INTERNAL_JWT_SECRET": OTHER,
        },
    )
    assert url(loaded) == "postgresql://u:p@h/d"
    assert loaded.auth.client_secrets == (SecretStr(SECRET),)
    assert loaded.auth.internal_secrets == (SecretStr(OTHER),)
    assert loaded.warnings == ()


def test_older_names_of_shops_still_work() -> None:
    loaded = settings(
        TOKEN_ENCRYPTION_KEY=SECRET, SHOPIFY_API_KEY="app", SHOPIFY_API_SECRET="shpss_x"
    )
    assert loaded.credentials.import_key == SecretStr(SECRET)
    assert (loaded.shopify.api_key, loaded.shopify.api_secrets) == ("app", (SecretStr("shpss_x"),))
    assert loaded.warnings == ()


def test_keys_in_a_file_are_enough_instead_of_secrets() -> None:
    base = without("GLAMD_AUTH__CLIENT_SECRETS")
    loaded = load(None, environ=base | {"GLAMD_AUTH__CLIENT_JWKS_FILE": "/keys/client.jwks"})
    assert loaded.auth.client_secrets == ()


def test_a_platform_is_renewed_in_one_way_only() -> None:
    one = {"platform": "custom", "token_url": "https://a.example/token", "client_id": "c"}
    one["client_secret_file"] = "/c"
    told = mistakes({"GLAMD_CREDENTIALS__OAUTH": json.dumps([one, one])})
    assert "should name each platform once" in told["credentials.oauth"]


@pytest.mark.parametrize(
    ("environ", "warning"),
    [
        ({"DEBUG": "app:*"}, "DEBUG is neither true nor false"),
        (
            {"MERCHANT_API_EXTERNAL_PORT": "8000"},
            "MERCHANT_API_EXTERNAL_PORT is not used any more: set",
        ),
        ({"BILLING_DB_ENABLED": "true"}, "BILLING_DB_ENABLED is not used any more: the database"),
        ({"CURRENT_KEY_VERSION": "v2", "TOKEN_ENCRYPTION_KEY_ID": "k"}, "differ"),
        (
            {"BDK_KMS_KEY_ID": "alias/bdk"},
            "(BDK_KMS_KEY_ID) is not used: no key provider is aws-kms",
        ),
    ],
)
def test_an_older_name_that_does_nothing_here_is_warned_of(
    environ: dict[str, str], warning: str
) -> None:
    (told,) = settings(**environ).warnings
    assert warning in told
    assert SECRET not in told


# ---- what is shown


def test_the_effective_settings_are_toml_without_a_secret() -> None:
    loaded = from_values(
        nested(**grants({}), database={"url": "postgresql://me:hunter2@db:5/x?password=hunter2"})
    )
    shown = effective(loaded)
    for secret in ("hunter2", SECRET, OTHER):
        assert secret not in shown + repr(loaded) + str(loaded)
    told = tomllib.loads(shown)
    assert told["database"]["url"] == "postgresql://me:**********@db:5/x?**********"
    assert told["auth"]["client_secrets"] == ["**********"]
    assert told["worker"]["grants"][0]["merchants"] == "*"
    assert told["http"]["port"] == 8080
    assert "# tls_cert is not set" in shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://db/x", "postgresql://db/x"),
        ("postgresql://me@db/x", "postgresql://me:**********@db/x"),
        ("postgresql://me:p%40ss@a:1,b:2/x", "postgresql://me:**********@a:1,b:2/x"),
        ("postgresql://me:p@ss@db/x", "**********"),
        ("postgresql:///x?host=/run&password=p", "postgresql:///x?**********"),
    ],
)
def test_a_shown_url_never_has_its_password(given: str, shown: str) -> None:
    loaded = from_values(nested(database={"url": given}))
    assert tomllib.loads(effective(loaded))["database"]["url"] == shown


# ---- the file that is installed


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if prefix + name == "billing.packs":
            # A pack's name is the operator's choice.
            yield from (f"billing.packs.{pack}" for pack in settings().billing.packs)
        elif inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def given(table: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        inner = value[0] if isinstance(value, list) and value else value
        if prefix == "billing.packs.":
            yield prefix + name
        elif isinstance(inner, dict):
            yield from given(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def uncommented() -> str:
    return re.sub(r"^#(?=[a-z\[])", "", ETC.read_text(), flags=re.MULTILINE)


def test_the_installed_file_sets_nothing_and_is_toml() -> None:
    assert list(given(tomllib.loads(ETC.read_text()))) == []
    assert load(ETC, environ=NEEDED) == settings()


def test_the_installed_file_has_every_key_and_no_other() -> None:
    assert sorted(given(tomllib.loads(uncommented()))) == sorted(keys(Settings))


def test_the_installed_file_is_valid_with_every_key_uncommented(toml: Path) -> None:
    toml.write_text(uncommented())
    told = mistakes({}, toml)
    refused = ["shopify.base_url", "auth.client_secrets", "auth.internal_secrets", "events.token"]
    assert sorted(told) == sorted(refused), "examples, and what excludes one another"
    text = uncommented().replace("<at least 32 bytes>", SECRET)
    toml.write_text(re.sub(r"^(base_url|token) =.*$", "", text, flags=re.MULTILINE))
    loaded = load(toml, environ={})
    assert [grant.name for grant in loaded.worker.grants] == ["settlement"]


def test_the_installed_file_shows_the_defaults() -> None:
    examples = {"node_id", "mqtt.public_host"} | {
        name
        for name in keys(Settings)
        if name.endswith(
            (
                *("url", "_cert", "_key", "_ca", "kek_file", "jwks_file", "group", "secrets"),
                *(
                    "events.user",
                    "events.password",
                    "events.token",
                    "start_at",
                    "kms_key_id",
                    "kms_key_ids",
                ),
                *("kms_region", "_module", "_token_label", "_pin_file", "head_file", "role"),
            )
        )
        or name.startswith(("worker.grants", "credentials.oauth"))
    }
    shown, defaults = tomllib.loads(uncommented()), tomllib.loads(effective(settings()))
    for name in set(keys(Settings)) - examples:
        assert value_at(shown, name) == value_at(defaults, name), name


def value_at(table: Mapping[str, object], name: str) -> object:
    found: object = table
    for part in name.split("."):
        assert isinstance(found, dict)
        found = found[part]
    return found


def test_every_secret_of_the_settings_may_come_from_a_file() -> None:
    def secrets(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, field in section.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            if SecretStr in kinds:
                yield (*path, name)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from secrets(field.annotation, (*path, name))

    assert sorted(secrets(Settings)) == sorted((*SINGLE_SECRETS, *LISTED_SECRETS))
