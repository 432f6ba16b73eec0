"""glamctl about devices: enrolment, which writes the device's files, their keys, their status."""

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
ENROLLED = ("is enrolled", "revoke it and enroll again")
CERTIFIED = ("has another certificate", "give the command again")
REKEYED = ("has another initial key", "write its key_set and ksn there by hand")
"""What was done before a file could not be written, and what mends it."""

MAX_CSR_BYTES = 16 * 1024
MAX_DOCUMENT_BYTES = 1024 * 1024


@click.group(cls=Group)
def device() -> None:
    """Devices: enroll, list, show, suspend, resume, revoke, rekey, rotate-certificate."""


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
        _show_all(enrolled, described)
        return
    _write(out, enrolled, described)
    _show_done(described, f"{described['device_id']} is enrolled; its files are in {out}.")


@device.command()
@click.argument("device_id")
@click.option("--ksn", required=True, help="The KSN that it was injected with anew, in hex.")
@click.option("--key-set", help="The key set of that key, where it is another one.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="The directory with its device.json, which is written anew.",
)
@click.option("--export-initial-key", is_flag=True, help="In development: the initial key too.")
def rekey(
    *, device_id: str, ksn: str, key_set: str | None, out: Path | None, export_initial_key: bool
) -> None:
    """Take it with another initial key, since it was injected anew; its certificate stays."""
    if export_initial_key and out is None and not session().as_json:
        raise click.UsageError("Say where to write the initial key with --out.")
    document = None if out is None else _document(out, device_id)
    body: dict[str, object] = {"ksn": ksn, "export_initial_key": export_initial_key}
    if key_set is not None:
        body["key_set"] = key_set
    rekeyed = mapping(session().client.post(f"/v1/devices/{segment(device_id)}/rekey", body))
    described = mapping(rekeyed["device"])
    key = rekeyed.get("initial_key")
    exported = {} if key is None else {"initial_key": key}
    if out is None or document is None:
        show_one({**described, **exported})
        return
    # The key before would encrypt what nobody can read any more.
    document.pop("initial_key", None)
    document |= {name: described[name] for name in ("scheme", "key_set", "ksn")} | exported
    _write_files(out, {"device.json": _as_text(document)}, device_id, REKEYED)
    _show_done(described, f"{device_id} has another initial key; {out} says so.")


@device.command("rotate-certificate")
@click.argument("device_id")
@click.option(
    "--csr",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Sign this certificate request; the key stays where it was made.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write the new files: an empty directory, or that of this device.",
)
def rotate_certificate(*, device_id: str, csr: Path | None, out: Path | None) -> None:
    """Give it another certificate; the one before is refused from now on."""
    if out is None and not session().as_json:
        raise click.UsageError("The key is shown only once: say where to write it with --out.")
    document = {} if out is None else _document(out, device_id, may_be_new=True)
    body = {} if csr is None else {"csr": _csr(csr)}
    path = f"/v1/devices/{segment(device_id)}/rotate-certificate"
    enrolled = mapping(session().client.post(path, body))
    described = mapping(enrolled["device"])
    if out is None:
        _show_all(enrolled, described)
        return
    # The request may have been made for the key that is there; the file is not for us to forget.
    names = ["initial_key"] if csr is None else ["initial_key", "key"]
    kept = {name: document[name] for name in names if name in document}
    _write(out, enrolled, described, kept=kept, done=CERTIFIED)
    _show_done(described, f"{device_id} has another certificate; its files are in {out}.")


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


def _show_all(enrolled: Mapping[str, object], described: Mapping[str, object]) -> None:
    show_json({**described, **{k: value for k, value in enrolled.items() if k != "device"}})


def _show_done(described: Mapping[str, object], sentence: str) -> None:
    if session().as_json:
        show_json(described)
    else:
        click.echo(sentence)


def _document(directory: Path, device_id: str, *, may_be_new: bool = False) -> dict[str, object]:
    """This device's device.json; nothing is asked of the daemon where it is another's."""
    path = directory / "device.json"
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_DOCUMENT_BYTES))
    except FileNotFoundError:
        if may_be_new:
            return {}
        raise click.UsageError(f"{directory} has no device in it.") from None
    except (OSError, ValueError):
        raise click.UsageError(f"{path} cannot be read.") from None
    if not isinstance(found, dict) or found.get("device_id") != device_id:
        raise click.UsageError(f"{directory} has another device in it.")
    return found


def _write(
    directory: Path,
    enrolled: Mapping[str, object],
    described: Mapping[str, object],
    *,
    kept: Mapping[str, object] | None = None,
    done: tuple[str, str] = ENROLLED,
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
        **(kept or {}),
    }
    if enrolled.get("initial_key") is not None:
        document["initial_key"] = enrolled["initial_key"]
    files = {
        "cert.pem": enrolled["certificate_pem"],
        "key.pem": key,
        "ca.pem": enrolled.get("server_ca_pem") or enrolled["ca_pem"],
        "device.json": _as_text(document),
    }
    _write_files(directory, files, str(described["device_id"]), done)


def _as_text(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _write_files(
    directory: Path, files: Mapping[str, object], device_id: str, done: tuple[str, str]
) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, str):
                _write_private(directory / name, content)
    except OSError as error:
        what, mend = done
        raise CommandError(
            "NOT_WRITTEN",
            f"{device_id} {what}, but {error.filename} could not be written"
            f" ({error.strerror}); {mend}",
        ) from None


def _write_private(path: Path, content: str) -> None:
    """A file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content)
