"""glamctl about key sets and devices' keys: imports, key blocks, retirement, rekeying."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from glamd.crypto.dukpt import key_check_value
from glamd.keys.key_sets.service import HsmKey
from tests.support.admin_world import INITIAL_KEY, KSN, PRIVATE_KEY, AdminWorld, failed, make_device
from tests.support.http_fakes import MERCHANT

IMPORT = ("keys", "import-bdk", "ks1", "--scheme", "aes-dukpt")
ENROLL = ("device", "enroll", "--merchant", str(MERCHANT), "--key-set", "ks1", "--ksn", KSN)
NEW_KSN = "FFFF9876543210F00000"


def done(result: Result) -> str:
    """The output of a command that was done."""
    assert result.exit_code == 0, result.output
    return result.stdout


def done_json(result: Result) -> Any:
    """The same as JSON."""
    return json.loads(done(result))


class TestImport:
    """Where a key comes from."""

    async def test_two_components_of_one_person_are_refused_by_the_daemon(
        self, running: AdminWorld
    ) -> None:
        keys = [bytes(range(16)), bytes(range(16, 32))]
        typed = ["2"]
        for key in keys:
            typed += ["Ann", key.hex(), key_check_value(key, "aes-dukpt")]
        line = failed(await running.glamctl(*IMPORT, "--components", stdin="\n".join(typed)), 1)
        assert "(components.1.holder: " in line
        assert line.count("components.1.holder") == 1, "said once"

    @pytest.mark.parametrize(
        "content",
        [
            b"A0016B0TX00E0000",
            b"D0016P0AX00E0000",
            b"D0016B0TX00E0000",
            b"D0017B0AX00E0000",
            b"",
            b"\xff" * 20,
            b"D" * 20_000,
        ],
        ids=range(7),
    )
    async def test_a_key_block_of_no_use_is_known_before_anybody_types(
        self, running: AdminWorld, tmp_path: Path, content: bytes
    ) -> None:
        file = tmp_path / "block"
        command = (*IMPORT, "--key-block", str(file))
        failed(await running.glamctl(*command), 2)
        file.write_bytes(content)
        failed(await running.glamctl(*command, stdin="2\nAnn\n"), 2)
        assert not running.keys.bdks

    async def test_settings_of_a_key_set_are_handed_on(self, running: AdminWorld) -> None:
        settings = ("--hsm-label", "bdk-1", "--reader", "idtech", "--counter-window", "64")
        done(await running.glamctl(*IMPORT, *settings))
        made = running.keys.key_sets["ks1"]
        assert (made.reader, made.counter_window) == ("idtech", 64)
        assert running.keys.bdks["ks1"] == HsmKey("bdk-1")

    @pytest.mark.parametrize(
        "options",
        [
            ("--components", "--hsm-label", "bdk-1"),
            ("--hsm-label", "bdk-1", "--clear", "12" * 16),
            ("--components", "--counter-window", "many"),
        ],
    )
    async def test_one_source_is_named_and_no_other(
        self, running: AdminWorld, options: tuple[str, ...]
    ) -> None:
        assert "1212" not in failed(await running.glamctl(*IMPORT, *options), 2)

    async def test_a_key_set_is_retired_after_asking(self, running: AdminWorld) -> None:
        done(await running.glamctl(*IMPORT, "--clear", "12" * 16))
        failed(await running.glamctl("keys", "retire-bdk", "ks1"), 2)
        assert running.keys.key_sets["ks1"].status == "active"
        retired = done_json(await running.glamctl("keys", "retire-bdk", "ks1", "--yes", "--json"))
        assert retired["status"] == "retired"
        assert retired["retired_at"] is not None
        line = failed(await running.glamctl("keys", "retire-bdk", "other", "--yes"), 1)
        assert line.startswith("KEY_SET_UNKNOWN: ")
        assert "retired" in done(await running.glamctl("keys", "list-bdk"))


class TestAnotherKey:
    """A device that was injected anew, and one with a new certificate."""

    @pytest.fixture
    async def till(self, running: AdminWorld, tmp_path: Path) -> Path:
        till = tmp_path / "till"
        done(await running.glamctl(*ENROLL, "--out", str(till), "--export-initial-key"))
        return till

    async def test_files_of_another_device_or_none_are_left_alone(
        self, running: AdminWorld, till: Path, tmp_path: Path
    ) -> None:
        running.registry.devices["dev_2"] = make_device("dev_2")
        before = (till / "device.json").read_bytes()
        nothing = str(tmp_path / "nothing")
        for command in (
            ("device", "rekey", "dev_2", "--ksn", NEW_KSN, "--out", str(till)),
            ("device", "rekey", "dev_1", "--ksn", NEW_KSN, "--out", nothing),
            ("device", "rekey", "dev_1", "--ksn", NEW_KSN, "--export-initial-key"),
            ("device", "rotate-certificate", "dev_2", "--out", str(till)),
            ("device", "rotate-certificate", "dev_1"),
        ):
            failed(await running.glamctl(*command), 2)
        assert (till / "device.json").read_bytes() == before
        (till / "device.json").write_text("[")
        rekey = ("device", "rekey", "dev_1", "--ksn", NEW_KSN, "--out", str(till))
        failed(await running.glamctl(*rekey), 2)
        assert running.registry.devices["dev_1"].ksn == KSN

    async def test_what_cannot_be_a_ksn_is_refused(self, running: AdminWorld, till: Path) -> None:
        line = failed(await running.glamctl("device", "rekey", "dev_1", "--ksn", "FFFF"), 1)
        assert line.startswith("VALIDATION_ERROR: ")
        assert "(ksn: " in line

    async def test_a_file_that_cannot_be_written_says_what_is_done_and_what_is_not(
        self, running: AdminWorld, till: Path
    ) -> None:
        (till / "cert.pem").unlink()
        (till / "cert.pem").mkdir()
        rotate = ("device", "rotate-certificate", "dev_1", "--out", str(till))
        line = failed(await running.glamctl(*rotate), 1)
        assert line.startswith("NOT_WRITTEN: dev_1 has another certificate, but ")

    async def test_a_rekeyed_devices_file_names_its_new_key_and_forgets_the_old_one(
        self, running: AdminWorld, till: Path
    ) -> None:
        rekey = ("device", "rekey", "dev_1", "--ksn", NEW_KSN, "--key-set", "ks2")
        assert "dev_1" in done(await running.glamctl(*rekey, "--out", str(till)))
        document = json.loads((till / "device.json").read_text())
        assert (document["ksn"], document["key_set"]) == (NEW_KSN, "ks2")
        assert "initial_key" not in document
        assert document["key"] == "key.pem"
        assert (till / "device.json").stat().st_mode & 0o777 == 0o600
        whole = (*rekey, "--out", str(till), "--export-initial-key", "--json")
        assert done_json(await running.glamctl(*whole))["ksn"] == NEW_KSN
        assert json.loads((till / "device.json").read_text())["initial_key"] == INITIAL_KEY
        shown = done_json(await running.glamctl(*rekey, "--export-initial-key", "--json"))
        assert (shown["device_id"], shown["initial_key"]) == ("dev_1", INITIAL_KEY)

    async def test_a_new_certificate_takes_the_place_of_the_one_before(
        self, running: AdminWorld, till: Path, tmp_path: Path
    ) -> None:
        before = json.loads((till / "device.json").read_text())
        rotate = ("device", "rotate-certificate", "dev_1")
        assert "certificate" in done(await running.glamctl(*rotate, "--out", str(till)))
        assert (till / "cert.pem").read_text() == "another certificate\n"
        assert json.loads((till / "device.json").read_text()) == before
        csr = tmp_path / "request.pem"
        csr.write_text("request")
        done(await running.glamctl(*rotate, "--csr", str(csr), "--out", str(till)))
        assert json.loads((till / "device.json").read_text()) == before
        done(await running.glamctl(*rotate, "--out", str(tmp_path / "new")))
        assert (tmp_path / "new" / "key.pem").read_text() == PRIVATE_KEY
        shown = done_json(await running.glamctl(*rotate, "--json"))
        assert shown["private_key_pem"] == PRIVATE_KEY
