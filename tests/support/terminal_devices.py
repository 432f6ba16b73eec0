"""Enrolled devices on disk for a test: real certificates, a made-up initial key, `device.json`."""

from pathlib import Path

import orjson

from tests.support.mqtt_tls import Authority

INITIAL_KEY = "6AC292FAA1315B4D858AB3A3D7D5933A"


def enrolled(
    authority: Authority, directory: Path, port: int, *, number: int = 1, trusts: Path | None = None
) -> Path:
    """The directory of a new TDES device that finds its server at 127.0.0.1:`port`."""
    device_id = f"dev-{number}"
    home = directory / device_id
    home.mkdir(parents=True)
    cert, key = authority.issue(device_id)
    (home / "cert.pem").write_bytes(cert.read_bytes())
    (home / "key.pem").write_bytes(key.read_bytes())
    (home / "ca.pem").write_bytes((trusts or authority.ca_file).read_bytes())
    (home / "device.json").write_bytes(
        orjson.dumps(
            {
                "device_id": device_id,
                "merchant_id": "0190a000-0000-7000-8000-000000000000",
                "scheme": "tdes-dukpt",
                "key_set": "demo-tdes",
                "ksn": f"FFFF98765432{number:02x}000000",
                "cert": "cert.pem",
                "key": "key.pem",
                "ca": "ca.pem",
                "mqtt": {"host": "127.0.0.1", "port": port},
                "initial_key": INITIAL_KEY,
            }
        )
    )
    return home
