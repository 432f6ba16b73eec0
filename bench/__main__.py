"""`make bench`: every row of speed, beside its rival of the same run if any, into `RESULTS.md`."""

import sys
from collections.abc import Iterable, Mapping

from bench import (
    actors,
    detokenize,
    dukpt,
    endpoint,
    events,
    http,
    ledger,
    reencryption,
    report,
    start,
    tokens,
)
from bench.report import Result

TOKEN_BAR = 10_000.0
ECHO_BAR = 0.5
PACED_BAR_MS = 5.0
DUKPT_BAR = 0.6
IDLE_BAR_BYTES = 2048
DEV_BAR_S = 6.0
RUN_BAR_S = 2.0


def main() -> int:
    """Measure everything, show it, write it. Missing a bar is told, it is no failure."""
    echo = {str(row["name"]): row for row in endpoint.measure()}
    figures = tokens.measure()
    # The echo again, so that a machine that got slower in between shows.
    again = {str(row["name"]): row for row in endpoint.measure(crowd=1)}
    results = [
        *_tokens(figures, echo, again),
        *_plain(dukpt.measure(), bar=f">= {DUKPT_BAR}", least_ratio=DUKPT_BAR),
        *_idle(actors.measure()),
        *_endpoint(echo.values()),
        *_http(http.measure()),
        *ledger.measure(),
        *events.measure(),
        *detokenize.measure(),
        *reencryption.measure(),
        *_start(figures),
    ]
    print(report.show(results))
    report.write("speed", results)
    return 0


def _tokens(
    figures: tokens.TokenFigures,
    echo: Mapping[str, Mapping[str, object]],
    again: Mapping[str, Mapping[str, object]],
) -> list[Result]:
    name = f"bare endpoint's echo, {tokens.TERMINALS} terminals"
    echo_per_s = (_value(echo[f"{name}, saturated"]) + _value(again[f"{name}, saturated"])) / 2
    echo_us = _value(echo[f"{name}, saturated, server's processor"])
    ratio = figures.per_s / echo_per_s
    return [
        Result(
            name=f"token, {tokens.TERMINALS} terminals, saturated",
            value=figures.per_s,
            unit="1/s",
            rival="bare endpoint's echo",
            rival_value=echo_per_s,
            ratio=ratio,
            bar=f">= {TOKEN_BAR:,.0f}/s and >= {ECHO_BAR} of the echo",
            holds=figures.per_s >= TOKEN_BAR and ratio >= ECHO_BAR,
            note=f"p50 {figures.p50_ms:.1f} ms, p99 {figures.p99_ms:.1f} ms",
        ),
        Result(
            name="token, the daemon's processor time",
            value=figures.daemon_us,
            unit="us",
            rival="the echo's",
            rival_value=echo_us,
            ratio=figures.daemon_us / echo_us,
        ),
        Result(
            name=f"token at {tokens.PACED_PER_S}/s, p99",
            value=figures.paced_p99_ms,
            unit="ms",
            rival="the echo's",
            rival_value=_value(echo[f"{name}, {tokens.PACED_PER_S}/s, p99"]),
            bar=f"<= {PACED_BAR_MS} ms",
            holds=figures.paced_p99_ms <= PACED_BAR_MS,
            note=f"p50 {figures.paced_p50_ms:.1f} ms",
        ),
    ]


def _plain(rows: Iterable[Mapping[str, object]], *, bar: str, least_ratio: float) -> list[Result]:
    return [
        Result(
            name=str(row["name"]),
            value=_value(row),
            unit=str(row["unit"]),
            rival=str(row["rival_name"]),
            rival_value=_number(row["rival"]),
            ratio=_number(row["ratio"]),
            bar=bar,
            holds=(_number(row.get("ratio")) or 0.0) >= least_ratio,
        )
        for row in rows
    ]


def _idle(rows: Iterable[Mapping[str, object]]) -> list[Result]:
    return [
        Result(
            name=str(row["name"]),
            value=_value(row),
            unit=str(row["unit"]),
            rival=str(row.get("rival", "")),
            ratio=_number(row.get("ratio")),
            bar=f"<= {IDLE_BAR_BYTES} bytes" if "idle" in str(row["name"]) else "",
            holds=_value(row) <= IDLE_BAR_BYTES if "idle" in str(row["name"]) else None,
        )
        for row in rows
    ]


def _endpoint(rows: Iterable[Mapping[str, object]]) -> list[Result]:
    return [
        Result(
            name=str(row["name"]),
            value=_value(row),
            unit=str(row["unit"]),
            bar=str(row.get("bar", "")),
            holds=bool(row["holds"]) if "holds" in row else None,
        )
        for row in rows
    ]


def _http(rows: Iterable[Mapping[str, object]]) -> list[Result]:
    return [
        Result(
            name=str(row["name"]),
            value=_value(row),
            unit=str(row["unit"]),
            rival=str(row["rival_name"]),
            rival_value=_number(row["rival"]),
            ratio=_number(row["ratio"]),
            bar=str(row.get("bar", "")),
            holds=bool(row["holds"]) if "holds" in row else None,
            note=str(row["note"]),
        )
        for row in rows
    ]


def _start(figures: tokens.TokenFigures) -> list[Result]:
    rows = (
        ("glamd dev ready, first start", figures.dev_ready_s, DEV_BAR_S),
        ("glamd dev ready, second start", figures.dev_ready_again_s, DEV_BAR_S),
        ("glamd run ready", start.measure(), RUN_BAR_S),
    )
    return [
        Result(name=name, value=value, unit="s", bar=f"<= {bar:.0f} s", holds=value <= bar)
        for name, value, bar in rows
    ]


def _value(row: Mapping[str, object]) -> float:
    value = _number(row["value"])
    assert value is not None
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


if __name__ == "__main__":
    sys.exit(main())
