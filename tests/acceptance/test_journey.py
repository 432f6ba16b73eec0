"""An operator's first day: `glamctl` and `glam-terminal` as processes against one daemon."""

import json
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import asyncpg
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.x509.oid import NameOID

from bench.harness import DevDaemon
from device_gateway.terminal_device import load_device
from glamd.admin.cli import glamctl
from glamd.crypto.dukpt import key_check_value
from tests.support.at_terminal import at_terminal
from tests.support.dev_client import Caller, call, connected, decrypted
from tests.support.postgres import eventually

DONE, FAILED, WRONGLY_USED = 0, 1, 2
LONG_S = 30.0
PAN: Final = "5555555555554444"
BDK: Final = "0123456789ABCDEFFEDCBA9876543210"
# Check values by the rules of spec 4: TDES over zeros, AES as a CMAC.
KCVS: Final = {
    scheme: key_check_value(bytes.fromhex(BDK), scheme) for scheme in ("tdes-dukpt", "aes-dukpt")
}
DEVICE_JSON: Final = [
    *("device_id", "merchant_id", "scheme", "key_set", "ksn", "cert", "key", "ca", "mqtt"),
]
NOBODY: Final = "00000000-0000-4000-8000-000000000000"
TOKENS: Final = "/api/v1/payment-tokens"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevDaemon]:
    """A fresh one."""
    made = DevDaemon(tmp_path_factory.mktemp("journey") / "state")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(made.state_dir)


class Operator:
    """Somebody at a shell."""

    def __init__(self, daemon: DevDaemon) -> None:
        self.daemon = daemon

    def answer(self, *words: str, status: int = DONE) -> Any:
        """What a command answers a program."""
        done = self.daemon.run("glamctl", "--json", *words)
        assert (done.returncode, done.stderr) == (status, ""), done
        return json.loads(done.stdout)

    def reads(self, *words: str) -> str:
        """What a command shows a person."""
        done = self.daemon.run("glamctl", *words)
        assert (done.returncode, done.stderr) == (DONE, ""), done
        return done.stdout

    def refused(self, *words: str, status: int = FAILED) -> str:
        """The one line that a command which was not done leaves.

        There are many of these, so they are run in this process, which is quicker.
        """
        socket = str(self.daemon.state_dir / "admin.sock")
        done = CliRunner().invoke(glamctl, ["--socket", socket, *words])
        assert (done.exit_code, done.stdout) == (status, ""), done.output
        [line] = done.stderr.splitlines()
        return line

    def device(self, directory: Path) -> Path:
        """The folder of a new device of the demo's merchant and key set."""
        out = directory / f"till-{secrets.token_hex(4)}"
        self.answer(
            *("device", "enroll", "--merchant", self.daemon.text("merchant_id")),
            *("--key-set", "demo-tdes", "--ksn", fresh_ksn()),
            *("--export-initial-key", "--out", str(out)),
        )
        return out

    def swipe(self, device: Path, *, status: int = DONE) -> Any:
        """What the terminal of this folder is answered, or says."""
        done = self.daemon.run(
            "glam-terminal", "swipe", PAN, "--device", str(device), "--json", "--timeout", "10"
        )
        assert done.returncode == status, done
        return json.loads(done.stdout) if status == DONE else done.stderr


@pytest.fixture
def operator(daemon: DevDaemon) -> Operator:
    """Who has the daemon's socket."""
    return Operator(daemon)


@pytest.fixture(scope="module")
def tapped(daemon: DevDaemon, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A device's folder and a token that it got, for tests that only look at them."""
    operator = Operator(daemon)
    device = operator.device(tmp_path_factory.mktemp("tapped"))
    return device, str(operator.swipe(device)["token"])


def fresh_ksn() -> str:
    """A TDES reader's KSN that no other has, its counter at zero."""
    return f"FFFF{secrets.token_hex(5)}000000".upper()


def id_of(device: Path) -> str:
    """The device of a folder."""
    return load_device(device).device_id


# ---- looking around


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("health",),
        ("version",),
        ("log-level",),
        ("actors", "list"),
        ("merchant", "list"),
        ("keys", "list"),
        ("keys", "list-bdk"),
        ("audit", "verify"),
    ],
    ids=" ".join,
)
def test_a_command_that_looks_shows_people_text(operator: Operator, words: tuple[str, ...]) -> None:
    shown = operator.reads(*words)
    assert shown.strip()
    assert not set("{}") & set(shown)


@pytest.mark.parametrize("words", [("--json", "device", "list"), ("device", "list", "--json")])
def test_json_may_be_said_before_and_behind(operator: Operator, words: tuple[str, ...]) -> None:
    assert len(json.loads(operator.reads(*words))) >= 2


def test_status_tells_what_runs_where(operator: Operator, daemon: DevDaemon) -> None:
    found = operator.answer("status")
    assert found["pid"] == daemon.pid
    assert found["health"] == {"status": "ready", "unavailable": {}, "degraded": {}}
    urls = {name: daemon.text(name, "url") for name in ("http", "worker")}
    for name, url in urls.items():
        assert url.endswith(found["listeners"][name])
    assert operator.answer("health")["status"] == "ready"
    versions = operator.answer("version")
    assert versions["glamctl"] == versions["glamd"] == found["version"]


def test_the_log_level_can_be_set_and_is_seen_at_once(
    operator: Operator, daemon: DevDaemon
) -> None:
    assert operator.answer("log-level", "warning") == {"level": "warning"}
    assert operator.answer("log-level") == {"level": "warning"}
    size = (daemon.state_dir / "glamd.log").stat().st_size
    operator.answer("health")
    assert (daemon.state_dir / "glamd.log").stat().st_size == size
    operator.answer("log-level", "info")
    operator.answer("health")
    line = json.loads((daemon.state_dir / "glamd.log").read_text().splitlines()[-1])
    assert (line["event"], line["listener"]) == ("http_request", "admin")


def test_no_daemon_is_one_line_and_status_1(daemon: DevDaemon, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none.sock")
    done = daemon.run("glamctl", "--socket", nowhere, "status")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == f"UNREACHABLE: there is no socket at {nowhere}; is glamd running?\n"


def test_a_wrong_use_is_one_line_and_status_2(daemon: DevDaemon) -> None:
    done = daemon.run("glamctl", "device", "show")
    assert (done.returncode, done.stdout) == (WRONGLY_USED, "")
    assert done.stderr.startswith("glamctl device show: Missing argument 'DEVICE_ID'.")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("frobnicate",), "frobnicate"),
        (("merchant", "create", "--platform", "custom"), "--shop-id"),
        (("keys", "import-bdk", "x", "--scheme", "des", "--clear", BDK), "--scheme"),
        (("keys", "import-bdk", "x", "--scheme", "aes-dukpt"), "--components"),
        (("log-level", "loud"), "loud"),
        (("device", "revoke", "dev_1"), "--yes"),
        (("tokens", "revoke", "ptk_1"), "--yes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_use_names_what_is_wrong_and_repeats_no_key(
    operator: Operator, words: tuple[str, ...], named: str
) -> None:
    line = operator.refused(*words, status=WRONGLY_USED)
    assert named in line
    assert BDK not in line


# ---- merchants


def test_a_merchant_is_made_once_found_again_and_listed(operator: Operator) -> None:
    given = str(uuid4())
    words = [
        *("merchant", "create", "--platform", "shopify", "--shop-id", given),
        *("--domain", f"{given}.example", "--id", given),
    ]
    created = operator.answer(*words)
    assert created["merchant_id"] == given
    assert operator.answer(*words) == created
    assert operator.answer("merchant", "show", given) == created | {
        "token_ttl_s": "default",
        "sensitive_data": "drop",
        "erase_requested_at": None,
        "erased_at": None,
    }
    assert created in operator.answer("merchant", "list", "--limit", "1000")
    assert given in operator.reads("merchant", "list", "--limit", "1000")


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"--platform": "ebay"}, "VALIDATION_ERROR", "platform"),
        ({"--domain": "no domain"}, "VALIDATION_ERROR", "domain"),
        ({"--domain": "demo-shop.example"}, "MERCHANT_EXISTS", "domain"),
    ],
)
def test_a_merchant_that_cannot_be_is_refused_by_field(
    operator: Operator, change: dict[str, str], code: str, field: str
) -> None:
    name = secrets.token_hex(6)
    given = {"--platform": "custom", "--shop-id": name, "--domain": f"{name}.example"} | change
    words = [word for pair in given.items() for word in pair]
    line = operator.refused("merchant", "create", *words)
    assert line.startswith(f"{code}: ")
    assert f"({field}: " in line


@pytest.mark.parametrize("unknown", [NOBODY, "not-an-id", "../status"])
def test_an_unknown_merchant_is_said_to_be_none(operator: Operator, unknown: str) -> None:
    assert operator.refused("merchant", "show", unknown).startswith("MERCHANT_NOT_FOUND: ")


# ---- keys


@pytest.mark.parametrize("scheme", ["tdes-dukpt", "aes-dukpt"])
def test_a_base_key_is_imported_once_and_shows_its_check_value(
    operator: Operator, scheme: str
) -> None:
    name = f"ks-{secrets.token_hex(6)}"
    words = ("keys", "import-bdk", name, "--scheme", scheme, "--clear", BDK)
    imported = operator.answer(*words)
    assert (imported["scheme"], imported["kcv"]) == (scheme, KCVS[scheme])
    line = operator.refused(*words)
    assert line.startswith("KEY_SET_EXISTS: ")
    assert "(key_set: " in line
    listed = operator.answer("keys", "list-bdk")
    assert [each for each in listed if each["key_set"] == name] == [imported | {"devices": 0}]
    assert BDK not in json.dumps(listed)


@pytest.mark.parametrize(
    ("scheme", "key", "named"),
    [
        ("tdes-dukpt", "zz" * 16, "clear: "),
        ("tdes-dukpt", "0123", "clear: "),
        ("tdes-dukpt", BDK + BDK[:16], "bdk: "),
        ("tdes-dukpt", BDK[:16] * 2, "bdk: "),
        ("aes-dukpt", "00" * 16, "bdk: "),
    ],
    ids=["no-hex", "too-short", "too-long", "single-des", "zero"],
)
def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(
    operator: Operator, scheme: str, key: str, named: str
) -> None:
    name = f"ks-{secrets.token_hex(6)}"
    line = operator.refused("keys", "import-bdk", name, "--scheme", scheme, "--clear", key)
    assert named in line
    assert key not in line
    assert name not in operator.reads("keys", "list-bdk")


def test_components_are_typed_unseen_and_combined(operator: Operator, daemon: DevDaemon) -> None:
    whole = bytes.fromhex(BDK)
    first = secrets.token_bytes(16)
    second = bytes(a ^ b for a, b in zip(whole, first, strict=True))
    name = f"ks-{secrets.token_hex(6)}"
    command = daemon.command(
        "glamctl", "keys", "import-bdk", name, "--scheme", "aes-dukpt", "--components"
    )

    def typed(kcv: str) -> list[tuple[str, str]]:
        return [
            ("How many components", "2"),
            ("holder of component 1", "Ann"),
            ("Component 1 of 2", first.hex()),
            ("Check value of component 1", key_check_value(first, "aes-dukpt")),
            ("holder of component 2", "Ben"),
            ("Component 2 of 2", second.hex().upper()),
            ("Check value of component 2", kcv),
        ]

    # Who mistypes may try again, and not for ever.
    wrong = typed("000000")
    code, shown = at_terminal(command, wrong + wrong[-2:] * 2)
    assert code == FAILED
    assert "component" in shown.splitlines()[-1].lower()
    assert name not in operator.reads("keys", "list-bdk")
    code, accepted = at_terminal(command, typed(key_check_value(second, "aes-dukpt")))
    assert code == DONE
    assert KCVS["aes-dukpt"] in accepted
    log = (daemon.state_dir / "glamd.log").read_text()
    for secret in (first.hex(), second.hex(), BDK):
        assert secret.lower() not in (shown + accepted + log).lower()


def test_the_keyrings_are_listed_by_version_and_check_value(operator: Operator) -> None:
    listed = operator.answer("keys", "list")
    assert {"audit", "fingerprints", "payment-tokens"} <= {each["keyring"] for each in listed}
    assert all(set(each) >= {"version", "status", "kcv"} for each in listed)
    assert not any("wrapped" in name for each in listed for name in each)


# ---- a device's life


@pytest.mark.parametrize("exported", [False, True])
def test_enrolment_writes_what_the_terminal_needs_as_the_contract_says(
    operator: Operator, daemon: DevDaemon, tmp_path: Path, exported: bool
) -> None:
    merchant, key_set = daemon.text("merchant_id"), "demo-tdes"
    ksn, out = fresh_ksn(), tmp_path / "till"
    words = ["device", "enroll", "--merchant", merchant, "--key-set", key_set, "--ksn", ksn]
    words += ["--serial", "77-1042", "--model", "Counter reader", "--out", str(out)]
    enrolled = operator.answer(*words, *(["--export-initial-key"] if exported else []))
    assert "initial_key" not in enrolled
    assert sorted(each.name for each in out.iterdir()) == [
        *("ca.pem", "cert.pem", "device.json", "key.pem"),
    ]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in out.iterdir()} == {0o600}
    document = json.loads((out / "device.json").read_text())
    assert list(document) == DEVICE_JSON + (["initial_key"] if exported else [])
    told = {"merchant_id": merchant, "scheme": "tdes-dukpt", "key_set": key_set, "ksn": ksn}
    told |= {"cert": "cert.pem", "key": "key.pem", "ca": "ca.pem"}
    assert {name: document[name] for name in told} == told
    ca = {"ca": daemon.text("mqtt", "ca")}
    assert document["mqtt"] | ca == daemon.description["mqtt"]
    assert (out / "ca.pem").read_text() == Path(daemon.text("mqtt", "ca")).read_text()
    certificate = x509.load_pem_x509_certificate((out / "cert.pem").read_bytes())
    [name] = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == document["device_id"] == enrolled["device_id"]
    again = operator.refused(*words, status=WRONGLY_USED)
    assert "already has a device" in again


def test_an_initial_key_is_in_use_once(
    operator: Operator, tapped: tuple[Path, str], tmp_path: Path
) -> None:
    device = load_device(tapped[0])
    line = operator.refused(
        *("device", "enroll", "--merchant", device.merchant_id, "--key-set", device.key_set),
        *("--ksn", device.ksn_at(0).hex(), "--out", str(tmp_path / "second")),
    )
    assert line.startswith("KSN_IN_USE: ")
    assert "(ksn: " in line
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--merchant": NOBODY}, "MERCHANT_NOT_FOUND: "),
        ({"--merchant": "shop"}, "merchant_id: "),
        ({"--key-set": "none"}, "KEY_SET_UNKNOWN: "),
        ({"--ksn": "FFFF98"}, "ksn: "),
        ({"--ksn": "no hex at all"}, "ksn: "),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_enrolment_that_cannot_be_writes_nothing_and_says_why(
    operator: Operator, daemon: DevDaemon, tmp_path: Path, change: dict[str, str], told: str
) -> None:
    given = {"--merchant": daemon.text("merchant_id"), "--key-set": "demo-tdes"}
    given |= {"--ksn": fresh_ksn(), "--out": str(tmp_path / "out")} | change
    line = operator.refused("device", "enroll", *(word for pair in given.items() for word in pair))
    assert told in line
    assert not (tmp_path / "out").exists()


async def test_a_terminal_is_online_while_it_is_connected(
    operator: Operator, tapped: tuple[Path, str]
) -> None:
    device = load_device(tapped[0])

    async def is_told(presence: str) -> bool:
        shown = operator.answer("device", "show", device.device_id)
        assert shown["status"] == "active"
        return bool(shown["presence"] == presence)

    # It has just ended the connection that it got its token on.
    await eventually(lambda: is_told("offline"))
    async with connected(device):
        await eventually(lambda: is_told("online"))
    await eventually(lambda: is_told("offline"))
    assert operator.answer("device", "show", device.device_id)["last_seen_at"] is not None


def test_a_device_is_suspended_resumed_and_revoked_for_good(
    operator: Operator, tmp_path: Path
) -> None:
    device = operator.device(tmp_path)
    device_id = id_of(device)
    assert operator.swipe(device)["brand"] == "mastercard"
    assert operator.answer("device", "suspend", device_id)["status"] == "suspended"
    assert operator.swipe(device, status=FAILED).startswith("glam-terminal: DEVICE_SUSPENDED: ")
    assert operator.answer("device", "resume", device_id)["status"] == "active"
    assert operator.swipe(device)["status"] == "ok"
    operator.refused("device", "revoke", device_id, status=WRONGLY_USED)
    assert operator.answer("device", "show", device_id)["status"] == "active"
    assert operator.answer("device", "revoke", device_id, "--yes")["status"] == "revoked"
    assert "not authorized" in operator.swipe(device, status=FAILED).lower()
    assert operator.refused("device", "resume", device_id).startswith("DEVICE_REVOKED: ")
    assert device_id in operator.reads("device", "list", "--limit", "1000")


def test_a_revocation_at_a_terminal_asks_first(
    operator: Operator, daemon: DevDaemon, tmp_path: Path
) -> None:
    device_id = id_of(operator.device(tmp_path))
    command = daemon.command("glamctl", "device", "revoke", device_id)
    for typed, code, then in (("n", FAILED, "active"), ("y", DONE, "revoked")):
        assert at_terminal(command, [(f"Revoke {device_id} for good?", typed)])[0] == code
        assert operator.answer("device", "show", device_id)["status"] == then


def test_the_actors_of_a_tap_are_seen_shown_and_stopped(
    operator: Operator, tapped: tuple[Path, str]
) -> None:
    device = tapped[0]
    listed = operator.answer("actors", "list", "--limit", "200")
    mine = [each for each in listed if id_of(device) in each["key"]]
    assert mine
    for each in mine:
        assert set(each) >= {"kind", "key", "mailbox", "handled", "restarts", "idle_s"}
        assert operator.answer("actors", "show", each["kind"], each["key"])["key"] == each["key"]
        operator.reads("actors", "stop", each["kind"], each["key"])
    # What is asked of it next makes it anew.
    assert operator.swipe(device)["status"] == "ok"
    assert operator.refused("actors", "show", "none", "none").startswith("ACTOR_NOT_FOUND: ")


# ---- tokens, the audit, JWTs


async def test_a_token_is_shown_without_its_card_and_revoked_for_good(
    operator: Operator, daemon: DevDaemon, tmp_path: Path
) -> None:
    token = operator.swipe(operator.device(tmp_path))["token"]
    shown = operator.answer("tokens", "show", token)
    assert (shown["status"], shown["bin"], shown["last4"]) == ("active", PAN[:8], PAN[-4:])
    assert PAN not in json.dumps(shown)
    assert (await decrypted(daemon, token)).data["pan"] == PAN
    operator.refused("tokens", "revoke", token, status=WRONGLY_USED)
    for _ in range(2):
        assert operator.answer("tokens", "revoke", token, "--yes")["status"] == "revoked"
    assert (await decrypted(daemon, token)).status == 410
    assert operator.answer("tokens", "show", token)["status"] == "revoked"
    unknown = operator.refused("tokens", "show", "ptk_" + "0" * 26)
    assert unknown.startswith("TOKEN_NOT_FOUND: ")


async def test_an_audit_row_that_somebody_changed_is_found_and_named(
    operator: Operator, daemon: DevDaemon, tapped: tuple[Path, str]
) -> None:
    token = tapped[1]
    assert (await decrypted(daemon, token)).status == 200
    whole = operator.answer("audit", "verify")
    assert (whole["ok"], whole["first_broken"]) == (True, None)
    superuser = await asyncpg.connect(daemon.text("database", "admin_url"), timeout=LONG_S)
    try:
        row = await superuser.fetchrow(
            "SELECT month, seq, actor FROM cde.decrypt_audit_log WHERE subject = $1", token
        )
        change = "UPDATE cde.decrypt_audit_log SET actor = $3 WHERE month = $1 AND seq = $2"
        await superuser.execute("SET session_replication_role = replica")
        await superuser.execute(change, row["month"], row["seq"], "somebody else")
        broken = operator.answer("audit", "verify", status=FAILED)
        done = daemon.run("glamctl", "audit", "verify")
        await superuser.execute(change, row["month"], row["seq"], row["actor"])
    finally:
        await superuser.close(timeout=LONG_S)
    assert not broken["ok"]
    assert broken["first_broken"]["partition"] == f"{row['month']:%Y-%m}"
    assert (broken["first_broken"]["seq"], broken["first_broken"]["reason"]) == (
        *(row["seq"], "changed"),
    )
    assert done.returncode == FAILED
    assert done.stdout.startswith(f"BROKEN at row {row['seq']} of {row['month']:%Y-%m}: changed")
    assert operator.answer("audit", "verify")["ok"]


@pytest.mark.parametrize("caller", ["client", "internal"])
async def test_a_minted_jwt_opens_the_rest_api_to_its_own_merchant(
    operator: Operator, daemon: DevDaemon, tapped: tuple[Path, str], caller: Caller
) -> None:
    merchant, token = load_device(tapped[0]).merchant_id, tapped[1]
    url = f"{daemon.text('http', 'url')}{TOKENS}/{token}"

    async def status(*words: str) -> int:
        minted = operator.answer("jwt", "mint", caller, *words)["token"]
        return (await call("GET", url, headers={"Authorization": f"Bearer {minted}"})).status

    if caller == "client":
        scope = ("--shop", "any.example", "--scope", "bff:call")
        assert await status("--merchant", merchant, *scope) == 200
        # A merchant that need not exist, and to whom this token does not.
        assert await status("--merchant", str(uuid4()), *scope) == 404
    else:
        service = ("--service", "platform-connector")
        assert await status(*service, "--scope", "payment:read") == 200
        assert await status(*service, "--scope", "payment:revoke") == 403
