"""How `glam-terminal` shows what came back: a card on one line, a load as a table and bars.

Whatever is shown of a card here came from glamd, which has no PAN to give.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from device_gateway.terminal import Answer
from device_gateway.terminal_histogram import Histogram
from device_gateway.terminal_load import Load, LoadReport

_BAR_CHARS = 40


def show_token(console: Console, answer: Answer, ms: float) -> None:
    """One token for people: the card as glamd knows it, the token, how long it took."""
    month, year = answer.fields.get("exp_month"), answer.fields.get("exp_year")
    expiry = (
        f"{month:02}/{year}" if isinstance(month, int) and isinstance(year, int) else "no expiry"
    )
    line = Text.assemble(
        (answer.text("brand"), "bold"),
        f" •••• {answer.text('last4')}  {expiry}  ",
        (answer.text("token"), "bold green"),
        (f"  {ms:.1f} ms", "dim"),
    )
    if answer.replayed:
        line.append("  replayed", "yellow")
    console.print(line, soft_wrap=True)


def progress_line(load: Load, elapsed_s: float) -> str:
    """What a load is doing right now."""
    report = load.report
    refused = sum(report.refused.values())
    return (
        f"{load.phase}  {elapsed_s:5.1f} s  {report.terminals} terminals  sent {report.sent:,}  "
        f"ok {report.ok:,}  refused {refused:,}  outstanding {load.outstanding:,}  "
        f"resent {report.resent:,}  p99 {_ms(report.latency.percentile(0.99))}"
    )


def show_report(console: Console, report: LoadReport) -> None:
    """A load's counts, then its latencies by powers of two."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("terminals", f"{report.terminals:,}", f"connected in {report.connect_s:.1f} s")
    table.add_row("answered", f"{report.rate_per_s:,.0f}/s", f"for {report.seconds:.1f} s")
    table.add_row("sent", f"{report.sent:,}", f"ok {report.ok:,}, replayed {report.replayed:,}")
    for title, counts in (("refused", report.refused), ("retried", report.retryable)):
        if counts:
            codes = ", ".join(f"{code} {count:,}" for code, count in counts.most_common())
            table.add_row(title, f"{sum(counts.values()):,}", codes)
    if report.resent or report.partings:
        table.add_row("resent", f"{report.resent:,}", f"{report.partings:,} connections lost")
    if report.shed:
        table.add_row("not sent", f"{report.shed:,}", "their terminals had too much outstanding")
    if report.unanswered:
        table.add_row("unanswered", f"[bold red]{report.unanswered:,}[/]")
    console.print(table)
    _show_latency(console, report.latency)


def _show_latency(console: Console, latency: Histogram) -> None:
    if not latency.count:
        return
    octaves = latency.octaves()
    most = max(count for _, count in octaves)
    for upper_us, count in octaves:
        bar = "█" * -(-count * _BAR_CHARS // most)
        console.print(
            f"≤ {_ms(upper_us):>10}  [cyan]{bar:<{_BAR_CHARS}}[/] {count:,}", highlight=False
        )
    named = "  ".join(
        f"{name} {_ms(latency.percentile(share))}"
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    )
    console.print(f"{named}  max {_ms(latency.max_us)}", highlight=False)


def report_json(report: LoadReport) -> dict[str, object]:
    """A load's report for programs; latencies in milliseconds."""
    latency = report.latency
    return {
        "terminals": report.terminals,
        "connect_s": round(report.connect_s, 3),
        "seconds": round(report.seconds, 3),
        "rate_per_s": round(report.rate_per_s, 1),
        "sent": report.sent,
        "ok": report.ok,
        "refused": dict(report.refused),
        "retryable": dict(report.retryable),
        "replayed": report.replayed,
        "resent": report.resent,
        "connections_lost": report.partings,
        "not_sent": report.shed,
        "unanswered": report.unanswered,
        "latency_ms": {
            "p50": latency.percentile(0.5) / 1000,
            "p90": latency.percentile(0.9) / 1000,
            "p99": latency.percentile(0.99) / 1000,
            "max": latency.max_us / 1000,
        },
    }


def _ms(duration_us: int) -> str:
    return (
        f"{duration_us / 1000:,.1f} ms" if duration_us >= 10_000 else f"{duration_us / 1000:.2f} ms"
    )
