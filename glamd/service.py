"""The life of a daemon process: `glamd run`, and the signals that `glamd dev` shares with it.

SIGTERM and SIGINT drain, SIGHUP reads certificates, JWT keys, grants and the log level again,
systemd is told what goes on. The daemon itself is built by `glamd.app`.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from glamd import app, config, logs
from glamd.errors import ConfigError
from glamd.systemd import Notifier

log = structlog.get_logger()


async def serve(config_file: Path | None) -> None:
    """Run until told to stop; ConfigError, UnavailableError when it cannot start."""
    settings = config.load(config.file_of(config_file), environ=os.environ)
    logs.configure(settings.logging.level, settings.logging.format, sys.stdout)
    config.check_files(settings)
    for warning in settings.warnings:
        log.warning("config_warning", warning=warning)
    with Notifier(os.environ) as systemd:
        watchdog = asyncio.create_task(systemd.watchdog(), name="watchdog")
        try:
            stop_requested, reload_requested = asyncio.Event(), asyncio.Event()
            # The handlers stay to the end: a second SIGTERM must not cut the drain short.
            with signals(stop=stop_requested, reload=reload_requested):
                async with app.running(settings, stop_requested) as daemon:
                    systemd.ready()
                    await _until_stopped(daemon, reload_requested, systemd, config_file)
                    systemd.stopping()
        finally:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)


@contextmanager
def signals(*, stop: asyncio.Event, reload: asyncio.Event | None = None) -> Iterator[None]:
    """Set the events when their signals come; twice is as good as once."""
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if reload is not None:
        handlers[signal.SIGHUP] = reload
    for number, event in handlers.items():
        loop.add_signal_handler(number, event.set)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


async def _until_stopped(
    daemon: app.Daemon, requested: asyncio.Event, systemd: Notifier, config_file: Path | None
) -> None:
    stop = asyncio.create_task(daemon.stop_requested.wait(), name="stop")
    try:
        while not stop.done():
            reload = asyncio.create_task(requested.wait(), name="reload")
            await asyncio.wait({stop, reload}, return_when=asyncio.FIRST_COMPLETED)
            reload.cancel()
            if requested.is_set():
                requested.clear()
                systemd.reloading()
                await _reload(daemon, config_file)
                systemd.ready()
    finally:
        stop.cancel()


async def _reload(daemon: app.Daemon, config_file: Path | None) -> None:
    """Take over log level, certificates and JWT keys; a mistake leaves everything as it was."""
    try:
        settings = config.load(config.file_of(config_file), environ=os.environ)
        await daemon.reload(settings)
    except ConfigError as error:
        log.error("reload_refused", reason=error.message)  # noqa: TRY400 - an operator's mistake
        return
    logs.set_level(settings.logging.level)
    log.info("reloaded", level=settings.logging.level)
