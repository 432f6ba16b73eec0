"""sd_notify as systemd hears it: a real datagram socket, by path and by abstract name."""

import asyncio
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from glamd.systemd import MAX_STATUS_CHARS, Notifier


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """systemd's end; `@` stands for the zero byte, as in the environment variable."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address.replace("@", "\0") if address.startswith("@") else address)
        heard.settimeout(5)
        yield heard


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"@glamd-{uuid.uuid4()}" if request.param == "abstract" else str(tmp_path / "notify")


def test_everything_that_is_said_arrives_in_order(address: str) -> None:
    with listening(address) as heard, Notifier({"NOTIFY_SOCKET": address}) as notifier:
        notifier.status("migrating")
        notifier.ready("serving 3 listeners")
        notifier.reloading()
        notifier.ready()
        notifier.stopping("draining")
        assert heard.recv(4096) == b"STATUS=migrating"
        assert heard.recv(4096) == b"READY=1\nSTATUS=serving 3 listeners"
        reloading, at = heard.recv(4096).split(b"\nMONOTONIC_USEC=")
        assert reloading == b"RELOADING=1"
        assert int(at) > 0
        assert heard.recv(4096) == b"READY=1"
        assert heard.recv(4096) == b"STOPPING=1\nSTATUS=draining"


def test_a_status_cannot_smuggle_another_line_in(address: str) -> None:
    with listening(address) as heard, Notifier({"NOTIFY_SOCKET": address}) as notifier:
        notifier.status("fine\nREADY=1\r\n\x0bSTOPPING=1")
        notifier.status("x" * 10_000)
        assert heard.recv(4096) == b"STATUS=fine READY=1 STOPPING=1"
        assert len(heard.recv(65536)) == len("STATUS=") + MAX_STATUS_CHARS


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "1000"}])
async def test_without_a_supervisor_nothing_is_said(environ: dict[str, str]) -> None:
    with capture_logs() as logged, Notifier(environ) as notifier:
        notifier.ready("up")
        notifier.status("up")
        notifier.stopping()
        await notifier.watchdog()
    assert logged == []


@pytest.mark.parametrize(
    ("environ", "event"),
    [
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, "notify_unsupported"),
        ({"WATCHDOG_USEC": "soon"}, "watchdog_unreadable"),
        ({"WATCHDOG_USEC": "-5"}, "watchdog_unreadable"),
        ({"WATCHDOG_USEC": "٣"}, "watchdog_unreadable"),
    ],
)
async def test_what_systemd_would_not_say_is_warned_of_and_passed_over(
    environ: dict[str, str], event: str
) -> None:
    with capture_logs() as logged, Notifier(environ) as notifier:
        notifier.ready()
        await notifier.watchdog()
    assert [entry["event"] for entry in logged] == [event]


def test_a_supervisor_that_is_gone_does_not_stop_the_work(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with Notifier({"NOTIFY_SOCKET": address}) as notifier, capture_logs() as logged:
        notifier.ready()
        with listening(address) as heard:
            notifier.ready()
            assert heard.recv(4096) == b"READY=1"
        notifier.stopping()
    assert [(entry["event"], entry["state"]) for entry in logged] == [
        ("notify_failed", "READY"),
        ("notify_failed", "STOPPING"),
    ]


def test_a_supervisor_that_does_not_listen_holds_nobody_up(address: str) -> None:
    with listening(address), Notifier({"NOTIFY_SOCKET": address}) as notifier:
        queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        with capture_logs() as logged:
            for _ in range(queue + 2):
                notifier.status("again")
                if logged:
                    break
    assert [entry["event"] for entry in logged] == ["notify_failed"]


def test_after_closing_nothing_is_said(address: str) -> None:
    with listening(address) as heard:
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.close()
        notifier.close()
        notifier.ready()
        heard.setblocking(False)
        with pytest.raises(BlockingIOError):
            heard.recv(4096)


# ---- the watchdog


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_this_processes_own(environ: dict[str, str], seconds: float | None) -> None:
    with Notifier(environ) as notifier:
        assert notifier.watchdog_s == seconds


async def test_the_event_loop_feeds_the_watchdog_at_half_of_its_time(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
    loop = asyncio.get_running_loop()
    with listening(address) as heard, Notifier(environ) as notifier:
        heard.setblocking(False)
        task = asyncio.create_task(notifier.watchdog())
        began_s = loop.time()
        async with asyncio.timeout(10):
            for _ in range(4):
                assert await loop.sock_recv(heard, 4096) == b"WATCHDOG=1"
        # The first comes at once, then one each 50 ms; a busy machine only makes it later.
        assert loop.time() - began_s >= 0.14
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
