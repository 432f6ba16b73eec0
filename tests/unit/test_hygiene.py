"""Each in a child process: what `protect_memory` does cannot be undone, so it is not for us."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from glamd import hygiene
from glamd.hygiene import Protection, protect_memory

TIMEOUT_S = 20.0
PROTECT = "from glamd.hygiene import protect_memory; found = protect_memory(); "
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def allow_core_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def child(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(hygiene.__file__).parents[1])},
        preexec_fn=allow_core_files,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_protected_process_has_no_core_limit_and_is_not_dumpable(tmp_path: Path) -> None:
    done = child(
        PROTECT + "import ctypes, resource; "
        "print(found.whole, resource.getrlimit(resource.RLIMIT_CORE), "
        "ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))",
        tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "True (0, 0) 0", done.stderr


def test_the_files_in_proc_of_a_protected_process_are_root_s(tmp_path: Path) -> None:
    code = "import os; print(os.stat('/proc/self/environ').st_mode, os.stat('/proc/self').st_uid)"
    done = child(PROTECT + code, tmp_path)
    assert done.stdout.split()[-1] == "0", done.stderr


def test_the_limit_cannot_be_raised_again_by_a_program_that_it_starts(tmp_path: Path) -> None:
    done = child(PROTECT + "import os; os.system('ulimit -H -c')", tmp_path)
    assert done.stdout.split()[-1] == "0", done.stderr


def test_a_crash_leaves_a_core_file_only_without_protection(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    bare, safe = tmp_path / "bare", tmp_path / "safe"
    bare.mkdir()
    safe.mkdir()
    assert child(CRASH, bare).returncode == -signal.SIGSEGV
    assert child(PROTECT + CRASH, safe).returncode == -signal.SIGSEGV
    assert not list(safe.iterdir())
    if hard == 0 or "/" in pattern or pattern.startswith("|"):
        pytest.skip(f"no core file is made here in any case (limit {hard}, pattern {pattern})")
    assert list(bare.iterdir()), "the comparison shows nothing where a bare crash leaves none"


def test_what_did_not_hold_is_logged_and_the_caller_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hygiene, "_without_core_file", lambda: True)
    monkeypatch.setattr(hygiene, "_made_undumpable", lambda: False)
    with capture_logs() as logs:
        found = protect_memory()
    assert found == Protection(no_core_file=True, not_dumpable=False)
    assert not found.whole
    assert [each["event"] for each in logs] == ["memory_unprotected"]
