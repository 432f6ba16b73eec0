"""A terminal's files: no counter is ever handed out twice, and a wrong file stops the terminal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from device_gateway import terminal_device
from device_gateway.terminal_device import Counters, Device, load_device
from glamd.crypto import dukpt
from glamd.errors import ConfigError, ConflictError

RAW: dict[str, object] = {
    "device_id": "dev-1",
    "merchant_id": "0190a000-0000-7000-8000-000000000000",
    "scheme": "tdes-dukpt",
    "key_set": "demo",
    "ksn": "FFFF9876543210E00000",
    "cert": "cert.pem",
    "key": "key.pem",
    "ca": "ca.pem",
    "mqtt": {"host": "127.0.0.1", "port": 8883},
    "initial_key": "6AC292FAA1315B4D858AB3A3D7D5933A",
}
MISSING = object()


def write(directory: Path, **changes: object) -> Path:
    merged = {**RAW, **changes}
    kept = {name: value for name, value in merged.items() if value is not MISSING}
    file = directory / "device.json"
    file.write_bytes(orjson.dumps(kept))
    return file


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return load_device(write(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, MISSING) for name in RAW),
        *((name, 5) for name in RAW),
        ("scheme", "rsa"),
        ("ksn", "FFFF"),
        ("ksn", "zz"),
        ("device_id", "a/b"),
        ("initial_key", "secret"),
        ("mqtt", {"host": "", "port": 1}),
        ("mqtt", {"host": "h", "port": 0}),
        ("mqtt", {"host": "h", "port": True}),
    ],
)
def test_a_wrong_device_file_says_which_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_device(write(tmp_path, **{field: value}))
    assert field in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_device_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "device.json").write_bytes(content)
    with pytest.raises(ConfigError):
        load_device(tmp_path)


def test_a_missing_device_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device\.json"):
        load_device(tmp_path)


def test_a_device_is_read_from_its_file_or_its_directory(tmp_path: Path) -> None:
    file = write(tmp_path, ksn="FFFF9876543210E00007")
    device = load_device(file)
    assert load_device(tmp_path) == device
    assert device.cert == tmp_path / "cert.pem"
    assert device.ksn_at(1).hex().upper() == "FFFF9876543210E00001"


def test_the_initial_key_is_in_no_repr(device: Device) -> None:
    assert device.initial_key.hex() not in repr(device).lower()
    assert repr(device.initial_key) not in repr(device)


def test_missing_certificate_files_are_a_clear_error(device: Device) -> None:
    with pytest.raises(ConfigError, match="certificate files of dev-1"):
        device.tls()


def test_a_counter_that_could_not_be_written_down_is_not_handed_out(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters(device)
    assert counters.take() == 1

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(ConfigError, match="No space left"):
                counters.take()
    assert counters.take() == 2


def test_what_is_written_is_never_less_than_what_was_handed_out(device: Device) -> None:
    counters = Counters(device, block=3)
    for _ in range(10):
        counter = counters.take()
        written = orjson.loads(device.counter_path.read_bytes())["reserved"]
        assert counter <= written


def test_after_a_crash_the_rest_of_a_block_is_skipped_and_nothing_is_used_again(
    device: Device,
) -> None:
    before = Counters(device, block=8)
    used = {before.take() for _ in range(3)}
    after = Counters(device, block=8)
    assert after.take() > max(used)


def test_a_terminal_that_is_killed_uses_no_counter_twice(device: Device, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from device_gateway.terminal_device import Counters, load_device\n"
        "counters = Counters(load_device(Path(sys.argv[1])), block=2)\n"
        "while True: print(counters.take(), flush=True)\n"
    )
    seen: list[int] = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            seen.extend(int(child.stdout.readline()) for _ in range(7))
            child.send_signal(signal.SIGKILL)
            # What stands in the pipe was handed out too; the last line may be torn.
            seen.extend(int(line) for line in child.stdout if line.endswith("\n"))
    assert len(set(seen)) == len(seen)
    assert Counters(device).take() > max(seen)


def test_two_processes_that_share_a_device_never_share_a_counter(device: Device) -> None:
    one, two = Counters(device, block=3), Counters(device, block=2)
    taken = [counters.take() for _ in range(20) for counters in (one, two)]
    assert len(set(taken)) == len(taken)


def test_what_was_given_back_is_used_next(device: Device) -> None:
    first = Counters(device, block=100)
    last = [first.take() for _ in range(5)][-1]
    first.give_back()
    assert Counters(device).take() == last + 1
    assert first.take() == last + 2


def test_nothing_is_given_back_once_somebody_else_took_more(device: Device) -> None:
    one, two = Counters(device, block=10), Counters(device, block=10)
    one.take()
    highest = two.take()
    one.give_back()
    assert Counters(device).take() > highest


@pytest.mark.parametrize("content", [b"", b"{}", b'{"reserved":-1}', b'{"reserved":"9"}', b"[1]"])
def test_a_broken_counter_file_stops_the_terminal_instead_of_starting_over(
    device: Device, content: bytes
) -> None:
    device.counter_path.write_bytes(content)
    with pytest.raises(ConfigError):
        Counters(device).take()


def test_another_initial_key_starts_from_the_beginning(device: Device, tmp_path: Path) -> None:
    Counters(device, block=50).take()
    other = load_device(write(tmp_path, ksn="FFFF9876543211000000"))
    assert Counters(other).take() == 1


def test_counters_that_the_standard_skips_are_skipped(device: Device) -> None:
    device.counter_path.write_bytes(
        orjson.dumps({"key_id": device.key_id.hex(), "reserved": 0b11111111110})
    )
    counters = Counters(device, block=64)
    taken = [counters.take() for _ in range(40)]
    assert taken == sorted(set(taken))
    assert taken[0] == 0b100000000000
    assert all(dukpt.valid_counter("tdes-dukpt", counter) for counter in taken)


def test_a_used_up_key_says_so(device: Device) -> None:
    last = 0b111111111100000000000
    device.counter_path.write_bytes(
        orjson.dumps({"key_id": device.key_id.hex(), "reserved": last - 1})
    )
    counters = Counters(device)
    assert counters.take() == last
    with pytest.raises(ConflictError, match="used up"):
        counters.take()


def test_the_counter_file_is_only_for_its_owner(device: Device) -> None:
    Counters(device).take()
    assert device.counter_path.stat().st_mode & 0o777 == 0o600


def test_a_durable_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    terminal_device.write_durably(file, b"old")

    def broken(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        terminal_device.write_durably(file, b"new")
    assert file.read_bytes() == b"old"
