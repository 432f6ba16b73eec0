"""glamctl about devices: enrolment, which writes the device's files, and its status."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import click

from glamd.admin.cli_common import (
    Group,
    confirm,
    limit_option,
    mapping,
    pages,
    session,
    show_json,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import CommandError, segment

COLUMNS = ("device_id", "merchant_id", "scheme", "key_set", "status", "presence", "last_seen_at")
MAX_CSR_BYTES = 16 * 1024


@click.group(cls=Group)
def device() -> None:
    """Devices: enroll, list, show, suspend, resume, revoke."""


@device.command()
@click.option("--merchant", "merchant_id", required=True, help="Whose device it is.")
@click.option("--key-set", required=True, help="The key set of the BDK it was injected under.")
@click.option("--ksn", required=True, help="The KSN it was injected with, in hex.")
@click.option("--serial", help="The maker's serial number.")
@click.option("--model", help="What it is.")
@click.option(
    "--csr",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Sign this certificate request; the key stays where it was made.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write device.json, cert.pem, key.pem and ca.pem.",
)
@click.option("--export-initial-key", is_flag=True, help="In development: the initial key too.")
def enroll(
    *,
    merchant_id: str,
    key_set: str,
    ksn: str,
    serial: str | None,
    model: str | None,
    csr: Path | None,
    out: Path | None,
    export_initial_key: bool,
) -> None:
    """Make a device; its private key is handed over once and kept nowhere."""
    if out is None and not session().as_json:
        raise click.UsageError("The key is shown only once: say where to write it with --out.")
    if out is not None:
        _refuse_overwriting(out)
    body: dict[str, object] = {
        "merchant_id": merchant_id,
        "key_set": key_set,
        "ksn": ksn,
        "serial": serial,
        "model": model,
        "csr": None if csr is None else _csr(csr),
        "export_initial_key": export_initial_key,
    }
    given = {name: value for name, value in body.items() if value is not None}
    enrolled = mapping(session().client.post("/v1/devices", given))
    described = mapping(enrolled["device"])
    if out is None:
        rest = {name: value for name, value in enrolled.items() if name != "device"}
        show_json({**described, **rest})
        return
    _write(out, enrolled, described)
    if session().as_json:
        show_json(described)
    else:
        click.echo(f"{described['device_id']} is enrolled; its files are in {out}.")


@device.command("list")
@click.option("--merchant", "merchant_id", help="Only this merchant's.")
@limit_option
def list_devices(merchant_id: str | None, limit: int) -> None:
    """All devices, by id."""
    query = {"merchant_id": merchant_id}
    show_list(pages("/v1/devices", "devices", limit=limit, query=query), COLUMNS)


@device.command()
@click.argument("device_id")
def show(device_id: str) -> None:
    """One device, with its status and presence."""
    show_one(mapping(session().client.get(f"/v1/devices/{segment(device_id)}")))


@device.command()
@click.argument("device_id")
def suspend(device_id: str) -> None:
    """Refuse its requests until it is resumed."""
    _change(device_id, "suspend")


@device.command()
@click.argument("device_id")
def resume(device_id: str) -> None:
    """Serve it again."""
    _change(device_id, "resume")


@device.command()
@click.argument("device_id")
@yes_option
def revoke(device_id: str, yes: bool) -> None:
    """Cut it off for good."""
    confirm(f"Revoke {device_id} for good?", yes=yes)
    _change(device_id, "revoke")


def _change(device_id: str, what: str) -> None:
    show_one(mapping(session().client.post(f"/v1/devices/{segment(device_id)}/{what}")))


def _csr(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_CSR_BYTES + 1)
    if len(raw) > MAX_CSR_BYTES or not raw.isascii():
        raise click.UsageError(f"{path} is no certificate request in PEM.")
    return raw.decode("ascii")


def _refuse_overwriting(directory: Path) -> None:
    """Another device's only copy of its key must not be lost to a repeated command."""
    if (directory / "device.json").exists():
        raise click.UsageError(f"{directory} already has a device in it.")


def _write(
    directory: Path, enrolled: Mapping[str, object], described: Mapping[str, object]
) -> None:
    """The device's files; `device.json` comes last, so that half a device is none."""
    key = enrolled["private_key_pem"]
    document: dict[str, object] = {
        "device_id": described["device_id"],
        "merchant_id": described["merchant_id"],
        "scheme": described["scheme"],
        "key_set": described["key_set"],
        "ksn": described["ksn"],
        "cert": "cert.pem",
        "key": None if key is None else "key.pem",
        "ca": "ca.pem",
        "mqtt": enrolled["mqtt"],
    }
    if enrolled.get("initial_key") is not None:
        document["initial_key"] = enrolled["initial_key"]
    files = {
        "cert.pem": enrolled["certificate_pem"],
        "key.pem": key,
        "ca.pem": enrolled.get("server_ca_pem") or enrolled["ca_pem"],
        "device.json": json.dumps(document, indent=2) + "\n",
    }
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, str):
                _write_private(directory / name, content)
    except OSError as error:
        raise CommandError(
            "NOT_WRITTEN",
            f"{described['device_id']} is enrolled, but {error.filename} could not be written"
            f" ({error.strerror}); revoke it and enroll again",
        ) from None


def _write_private(path: Path, content: str) -> None:
    """A file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content)
