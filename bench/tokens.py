"""The payment path as terminals see it: `glamd dev` beside `glam-terminal load`, both processes.

The limit it is held against is the same endpoint echoing at once (`bench.endpoint`), measured by
whoever runs this in the same run. Here is only the daemon.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.harness import DevDaemon

TERMINALS = 200
PACED_PER_S = 300
WARM_UP_S = 2.0
LOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFigures:
    """Saturated: tokens a second and latencies; at 300/s: latencies; and the times to be ready."""

    per_s: float
    p50_ms: float
    p99_ms: float
    paced_p50_ms: float
    paced_p99_ms: float
    daemon_us: float
    dev_ready_s: float
    dev_ready_again_s: float


def measure(seconds: float = 8.0) -> TokenFigures:
    """Start a daemon of its own, warm it up, load it, and stop it."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        daemon = DevDaemon(Path(folder) / "state")
        first_s = daemon.start()
        try:
            _load(daemon, WARM_UP_S, 0)
            spent_s = _processor_s(daemon.pid)
            saturated = _load(daemon, seconds, 0)
            spent_s = _processor_s(daemon.pid) - spent_s
            paced = _load(daemon, seconds, PACED_PER_S)
            daemon.stop()
            again_s = daemon.start()
        finally:
            daemon.stop()
    return TokenFigures(
        per_s=saturated.rate_per_s,
        p50_ms=saturated.p50_ms,
        p99_ms=saturated.p99_ms,
        paced_p50_ms=paced.p50_ms,
        paced_p99_ms=paced.p99_ms,
        daemon_us=spent_s / saturated.ok * 1e6,
        dev_ready_s=first_s,
        dev_ready_again_s=again_s,
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    ok: int
    rate_per_s: float
    p50_ms: float
    p99_ms: float


def _load(daemon: DevDaemon, seconds: float, rate_per_s: int) -> _Loaded:
    done = daemon.run(
        "glam-terminal",
        "load",
        *("--state-dir", str(daemon.state_dir), "--terminals", str(TERMINALS), "--json"),
        *("--seconds", str(seconds), "--rate", str(rate_per_s)),
        timeout_s=LOAD_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load failed: {done.stderr}")
    told = json.loads(done.stdout)
    if told["ok"] != told["sent"]:
        raise RuntimeError(f"not every tap became a token: {told}")
    return _Loaded(
        told["ok"], told["rate_per_s"], told["latency_ms"]["p50"], told["latency_ms"]["p99"]
    )


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
