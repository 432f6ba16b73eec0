"""What an operator installs fits the daemon: the unit, its credentials, its user and folders."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from glamd.config import DEFAULT_CONFIG_FILE, Settings, from_values, load
from glamd.config_sources import LISTED_SECRETS, SINGLE_SECRETS
from glamd.systemd import Notifier

ETC = Path(__file__).parents[2] / "etc"
MAX_EXPOSURE = 2.0


def unit() -> dict[str, list[str]]:
    """Every directive with its values in order; an empty value takes back those before it."""
    found: dict[str, list[str]] = {}
    for line in (ETC / "glamd.service").read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def settings_under_systemd(credentials: Path) -> Settings:
    """What the daemon would find: the unit's environment and credentials, and a few paths."""
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    for assignment in unit()["Environment"]:
        name, _, value = shlex.split(assignment)[0].partition("=")
        environ[name] = value.replace("%d", str(credentials))
    for name in ("MQTT__TLS_CERT", "MQTT__TLS_KEY", "MQTT__CLIENT_CA", "DEVICES__CA_CERT"):
        environ[f"GLAMD_{name}"] = f"/etc/glamd/{name}"
    return load(ETC / "glamd.toml", environ=environ)


def test_the_units_credentials_are_all_the_secrets_that_a_start_needs(tmp_path: Path) -> None:
    content = {
        "database.url": "postgresql://glamd:hunter2@localhost/glamd\n",
        "auth.client_secrets": "c" * 32,
        "auth.internal_secrets": "i" * 32,
    }
    for credential in unit()["LoadCredential"]:
        name, _, source = credential.partition(":")
        assert source == f"/etc/glamd/credentials/{name}"
        (tmp_path / name).write_text(content.get(name, "x"))
    settings = settings_under_systemd(tmp_path)
    assert settings.keys.kek_file == tmp_path / "kek"
    assert settings.devices.ca_key == tmp_path / "device-ca.key"
    assert settings.devices.ca_key.is_file()
    assert settings.keys.kek_file.is_file()
    assert settings.auth.client_secrets[0].get_secret_value() == "c" * 32


def test_every_credential_is_a_secret_of_the_settings_or_a_file_that_one_names() -> None:
    names = {credential.partition(":")[0] for credential in unit()["LoadCredential"]}
    secrets = {".".join(path) for path in (*SINGLE_SECRETS, *LISTED_SECRETS)}
    files = {value.rpartition("/")[2] for value in unit()["Environment"]}
    assert names <= secrets | files
    assert files <= names


def test_systemd_waits_longer_than_a_drain_and_does_not_restart_a_wrong_setting() -> None:
    directives = unit()
    values = {
        "database": {"url": "postgresql://x/y"},
        "mqtt": {"tls_cert": "/c", "tls_key": "/k", "client_ca": "/a"},
        "devices": {"ca_cert": "/a", "ca_key": "/k"},
        "auth": {"client_secrets": ["c" * 32], "internal_secrets": ["i" * 32]},
        "keys": {"kek_file": "/kek"},
    }
    settings = from_values(values)
    assert float(directives["TimeoutStopSec"][-1]) > settings.drain_timeout_s + 5
    assert directives["RestartPreventExitStatus"] == ["78"]
    assert int(directives["LimitNOFILE"][-1]) > settings.mqtt.max_connections * 2
    assert settings.admin.socket.parent == Path("/run") / directives["RuntimeDirectory"][-1]
    assert f"--config {DEFAULT_CONFIG_FILE}" in directives["ExecStart"][-1]


def test_the_unit_says_what_the_daemon_relies_on() -> None:
    directives = unit()
    assert directives["Type"] == ["notify"]
    assert directives["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert directives["LimitCORE"] == ["0"]
    assert directives["CapabilityBoundingSet"] == [""]
    assert "PrivateUsers" not in directives, "every caller of the admin socket would be nobody"
    watchdog_usec = str(int(directives["WatchdogSec"][-1]) * 1_000_000)
    assert Notifier({"WATCHDOG_USEC": watchdog_usec}).watchdog_s == 30


def test_the_units_user_and_group_are_made_and_may_read_the_settings() -> None:
    users = [line.split() for line in (ETC / "glamd.sysusers").read_text().splitlines()]
    assert ["u", "glamd"] in [line[:2] for line in users]
    assert unit()["User"] == unit()["Group"] == ["glamd"]
    folders = {
        line[1]: line[2:5]
        for line in map(str.split, (ETC / "glamd.tmpfiles").read_text().splitlines())
        if line and line[0] == "d"
    }
    assert folders == {
        "/etc/glamd": ["0750", "root", "glamd"],
        "/etc/glamd/credentials": ["0700", "root", "root"],
    }


@pytest.mark.debian
def test_systemd_finds_the_unit_hardened_enough(
    debian_program: Callable[[str, str], Path],
) -> None:
    analyze = debian_program("/usr/bin/systemd-analyze", "systemd")
    done = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={MAX_EXPOSURE * 10:.0f}",
         ETC / "glamd.service"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@pytest.mark.debian
def test_systemd_understands_every_line_of_the_unit(
    debian_program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    analyze = debian_program("/usr/bin/systemd-analyze", "systemd")
    # The program is not installed where the unit says; any other executable stands in for it.
    text = (ETC / "glamd.service").read_text()
    copy = tmp_path / "glamd.service"
    copy.write_text(text.replace("/opt/glamd/bin/glamd", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", copy], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- alert rules


def test_every_metric_of_the_alert_rules_is_one_that_the_daemon_has() -> None:
    # The composition root imports every room, each of which registers its metrics.
    import_module("glamd.app")
    told = generate_latest().decode()
    there = set(re.findall(r"^# TYPE (\w+) ", told, re.MULTILINE))
    text = (ETC / "glamd.rules.yml").read_text()
    named = set(re.findall(r"\bglamd_\w+", text))
    assert len(named) > 5
    for name in named:
        assert name.removesuffix("_bucket") in there, name
