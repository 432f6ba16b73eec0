"""Where settings come from: the TOML file, the environment, files of secrets. Raw values only.

What a setting means, and whether its value is right, is `glamd.config`'s. Each source lays its
values over those before it: the file, the older names in the environment, `GLAMD_…`, then secrets
from files and systemd credentials. Mistakes are collected, not raised one by one; none repeats a
value, since that may be a secret.

pydantic-settings is not used: its environment source stops at the first value that it cannot
parse, passes over an unknown `GLAMD_` name in silence, and reads `os.environ` by itself.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glamd.errors import ConfigError, FieldError

KeyPath = tuple[str, ...]

PREFIX = "GLAMD_"
NESTED = "__"
NOT_SETTINGS = frozenset({"GLAMD_STATE_DIR", "GLAMD_ADMIN_SOCKET", "GLAMD_IMPORT_URL"})
"""Names of ours that `glamd dev` and `glamctl` read, and that a daemon passes over."""
MAX_CONFIG_BYTES = 1024 * 1024
MAX_SECRET_BYTES = 64 * 1024
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
"""Where systemd puts what a unit's `LoadCredential=` names, and tells the service."""

SINGLE_SECRETS: tuple[KeyPath, ...] = (
    ("database", "url"),
    ("database", "cde_url"),
    ("database", "owner_url"),
    ("database", "cde_owner_url"),
    ("credentials", "import_key"),
    ("events", "password"),
    ("events", "token"),
)
LISTED_SECRETS: tuple[KeyPath, ...] = (
    ("auth", "client_secrets"),
    ("auth", "internal_secrets"),
    ("shopify", "api_secrets"),
    ("checkout", "secrets"),
)
"""These may come from a file: `<key>_file` names it, or a credential has the key's dotted name.
A list has one secret on each line."""

_ENVIRONMENTS = {
    "production": "production",
    "prod": "production",
    "staging": "production",
    "development": "development",
    "dev": "development",
    "local": "development",
    "test": "development",
    "testing": "development",
}
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})

# Applied in this order, so that of two names for one setting the lower one wins.
_OLDER_NAMES: tuple[tuple[str, KeyPath], ...] = (
    ("DATABASE_URL", ("database", "url")),
    ("ENVIRONMENT", ("environment",)),
    ("APP_ENV", ("environment",)),
    ("LOGGING_LEVEL", ("logging", "level")),
    ("CLIENT_JWT_SECRET", ("auth", "client_secrets")),
    ("INTERNAL_JWT_SECRET", ("auth", "internal_secrets")),
    ("DEFAULT_TOKEN_TTL_HOURS", ("payments", "default_token_ttl_h")),
    ("TOKEN_ENCRYPTION_KEY_ID", ("keys", "first_version")),
    ("CURRENT_KEY_VERSION", ("keys", "first_version")),
    ("TOKEN_ENCRYPTION_KEY", ("credentials", "import_key")),
    ("BDK_KMS_KEY_ID", ("keys", "bdk_kms_key_id")),
    ("SHOPIFY_API_KEY", ("shopify", "api_key")),
    ("SHOPIFY_API_SECRET", ("shopify", "api_secrets")),
    ("SHOPIFY_API_VERSION", ("shopify", "api_version")),
)
_DROPPED_SUFFIXES = {
    "_API_EXTERNAL_PORT": "set http.port (GLAMD_HTTP__PORT) instead",
    "_DB_ENABLED": "the database is always used; set database.url (GLAMD_DATABASE__URL)",
}


@dataclass(slots=True)
class Gathered:
    """What the sources said: nested raw values, who said it, and what was wrong already."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[FieldError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def put(self, path: KeyPath, value: object, origin: str) -> None:
        """Lay one value over what is there. What stands below a plain value is left out, since the
        plain value is the mistake that will be reported."""
        table = self.values
        for part in path[:-1]:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                return
            table = inner
        table[path[-1]] = value
        self.origins[path] = origin

    def take(self, path: KeyPath) -> object:
        """Remove one value and return it; `None` where there is none."""
        table: object = self.values
        for part in path[:-1]:
            table = table.get(part) if isinstance(table, dict) else None
        return table.pop(path[-1], None) if isinstance(table, dict) else None


def gather(config_file: Path | None, environ: Mapping[str, str]) -> Gathered:
    """All sources laid over each other. An empty variable counts as absent.

    Raises `ConfigError` for a file that cannot be read at all, since without it every further
    mistake would be a guess.
    """
    gathered = Gathered()
    if config_file is not None:
        _put_table(gathered, (), _toml(config_file), config_file.name)
    given = {name: environ[name] for name in sorted(environ) if environ[name].strip()}
    _older_names(gathered, given)
    for name, value in given.items():
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            gathered.put(tuple(name.removeprefix(PREFIX).lower().split(NESTED)), value, name)
    _secrets(gathered, given.get(CREDENTIALS_VARIABLE))
    return gathered


def variable(path: KeyPath) -> str:
    """The environment variable of a key: `GLAMD_HTTP__PORT` of `http.port`."""
    return PREFIX + NESTED.join(path).upper()


def _toml(config_file: Path) -> dict[str, object]:
    name = str(config_file)
    try:
        text = _read(config_file, MAX_CONFIG_BYTES)
        return tomllib.loads(text)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        reason = f"is not TOML: {error}"
    except ValueError as error:
        reason = str(error)
    raise ConfigError(f"{name} {reason}", fields=[FieldError(name, reason)])


def _read(path: Path, limit_bytes: int) -> str:
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"is larger than {limit_bytes} bytes")
    return data.decode("utf-8")


def _put_table(gathered: Gathered, path: KeyPath, table: dict[str, object], origin: str) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            _put_table(gathered, (*path, key), value, origin)
        else:
            gathered.put((*path, key), value, origin)


def _older_names(gathered: Gathered, given: Mapping[str, str]) -> None:
    """The names that three older services were configured with."""
    debug = given.get("DEBUG", "").strip().lower()
    if debug in _TRUE:
        gathered.put(("logging", "level"), "debug", "DEBUG")
    elif debug and debug not in _FALSE:
        # Every other tool reads a DEBUG of its own, so a foreign one must not stop the start.
        gathered.warnings.append("DEBUG is neither true nor false and was passed over")
    for name, path in _OLDER_NAMES:
        value = given.get(name)
        if value is None:
            continue
        if path == ("environment",):
            value = _ENVIRONMENTS.get(value.strip().lower(), value)
        gathered.put(path, (value,) if path in LISTED_SECRETS else value, name)
    first, other = given.get("CURRENT_KEY_VERSION"), given.get("TOKEN_ENCRYPTION_KEY_ID")
    if first and other and first != other:
        gathered.warnings.append(
            "CURRENT_KEY_VERSION and TOKEN_ENCRYPTION_KEY_ID differ; the first names key versions"
        )
    for name in given:
        for suffix, instead in _DROPPED_SUFFIXES.items():
            if name.endswith(suffix) and not name.startswith(PREFIX):
                gathered.warnings.append(f"{name} is not used any more: {instead}")


def _secrets(gathered: Gathered, credentials: str | None) -> None:
    """Lay secrets from `<key>_file`, then from systemd's credentials, over all that came before."""
    for path in (*SINGLE_SECRETS, *LISTED_SECRETS):
        file_key = (*path[:-1], f"{path[-1]}_file")
        named = gathered.take(file_key)
        if isinstance(named, str):
            _secret(gathered, path, Path(named), ".".join(file_key))
        elif named is not None:
            gathered.mistakes.append(FieldError(".".join(file_key), "should be the path of a file"))
        if credentials is not None:
            name = ".".join(path)
            credential = Path(credentials) / name
            if os.path.lexists(credential):
                _secret(gathered, path, credential, f"credential {name}")


def _secret(gathered: Gathered, path: KeyPath, file: Path, origin: str) -> None:
    try:
        text = _read(file, MAX_SECRET_BYTES)
    except OSError as error:
        reason = f"its file cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        reason = "its file is not UTF-8"
    except ValueError as error:
        reason = f"its file {error}"
    else:
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if path in LISTED_SECRETS and lines:
            gathered.put(path, lines, origin)
            return
        if len(lines) == 1:
            gathered.put(path, lines[0], origin)
            return
        reason = "its file should hold one line" if lines else "its file is empty"
    gathered.mistakes.append(FieldError(".".join(path), f"{reason} (from {origin})"))
