"""`make setup` on machines of all kinds, played by stand-ins; and what the lock holds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

# Plays `virtualenv` or `uv`: makes an environment whose python only notes how it is called.
MAKES_AN_ENVIRONMENT = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
for target; do :; done
mkdir -p "$target/bin"
printf '#!/bin/sh\\necho "python $*" >>"$CALLS"\\n' >"$target/bin/python"
echo "#!$PWD/$target/bin/python" >"$target/bin/pip"
chmod +x "$target/bin/python"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory, with a space in its name, that has just what `make setup` reads."""
    directory = tmp_path / "a check out"
    directory.mkdir()
    for name in ("Makefile", "requirements.lock", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    return directory


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A directory at the front of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


def add(directory: Path, name: str) -> None:
    """Put a stand-in there."""
    program = directory / name
    program.write_text(MAKES_AN_ENVIRONMENT)
    program.chmod(0o755)


def make(checkout: Path, stand_ins: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make with a python that has no venv module."""
    assert MAKE is not None
    return subprocess.run(
        [MAKE, "PYTHON=false", *arguments],
        cwd=checkout,
        env={"PATH": f"{stand_ins}:/usr/bin:/bin", "CALLS": str(stand_ins / "calls")},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def calls(stand_ins: Path) -> list[str]:
    """How the stand-ins were called, in order, without python's own probe."""
    lines = (stand_ins / "calls").read_text().splitlines()
    return [line for line in lines if line != "python -c "]


@pytest.mark.skipif(
    any(Path(d, p).exists() for d in ("/usr/bin", "/bin") for p in ("uv", "virtualenv")),
    reason="a uv or virtualenv of the system's own would serve",
)
def test_without_venv_one_line_names_the_package(checkout: Path, stand_ins: Path) -> None:
    done = make(checkout, stand_ins, "setup")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert told == ["Please install the Debian package python3.11-venv."]


@pytest.mark.parametrize("tool", ["uv", "virtualenv"])
def test_where_venv_is_missing_another_tool_serves(
    checkout: Path, stand_ins: Path, tool: str
) -> None:
    add(stand_ins, tool)
    done = make(checkout, stand_ins, "setup")
    assert done.returncode == 0, done.stderr
    first, *installs = calls(stand_ins)
    assert first.startswith(f"{tool} ")
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert "--requirement requirements.lock" in installs[0]
    assert installs[1].endswith("--editable .")
    assert "Ready" in done.stdout


def test_a_second_setup_does_nothing_until_the_lock_changes(
    checkout: Path, stand_ins: Path
) -> None:
    add(stand_ins, "virtualenv")
    make(checkout, stand_ins, "setup")
    before = calls(stand_ins)
    assert make(checkout, stand_ins, "setup").returncode == 0
    assert calls(stand_ins) == before
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    make(checkout, stand_ins, "setup")
    assert len(calls(stand_ins)) == len(before) + 2


def test_an_environment_that_was_moved_is_made_anew(checkout: Path, stand_ins: Path) -> None:
    add(stand_ins, "virtualenv")
    make(checkout, stand_ins, "setup")
    moved = checkout.with_name("moved")
    checkout.rename(moved)
    done = make(moved, stand_ins, "setup")
    assert "was moved" in done.stdout
    assert [line.split()[0] for line in calls(stand_ins)].count("virtualenv") == 2


def test_an_interrupted_setup_is_taken_up_again(checkout: Path, stand_ins: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    add(stand_ins, "virtualenv")
    assert make(checkout, stand_ins, "setup").returncode == 0


def test_make_alone_tells_every_target(checkout: Path, stand_ins: Path) -> None:
    told = make(checkout, stand_ins).stdout
    for target in ("setup", "run", "test", "check", "bench", "faults", "clean"):
        assert re.search(rf"^  {target} ", told, re.MULTILINE)


def test_the_lock_pins_everything_by_hash_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    joined = re.sub(r"(?m)^(#.*)?\n", "", text).replace("\\\n", " ")
    requirements = joined.splitlines()
    assert requirements
    for requirement in requirements:
        assert re.fullmatch(
            r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!]+( +--hash=sha256:[0-9a-f]{64})+", requirement
        )
    assert {"setuptools", "wheel"} <= {line.partition("==")[0] for line in requirements}
