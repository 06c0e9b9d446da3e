"""What both commands of the README share: a place to run in, made where there is none.

Called by example/manage.py and runtests.py before they import anything that is not
in the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure(*modules: str, extras: str = "") -> None:
    """Go on only where every one of the modules can be imported.

    Returns at once where this interpreter has them. Otherwise the same command starts
    again inside `.venv`, which is made, or completed with the project and its
    `extras`, where need be. Exits with a sentence on what to do where that fails.
    """
    if sys.version_info < (3, 11):
        sys.exit(f"async_queue needs Python 3.11 or newer; {sys.executable} is older.")
    if not _missing(modules):
        return
    if not _has(modules):
        print(f"Setting up {VENV}: the project and what it needs (once).", flush=True)
        _make_environment()
        if problem := install(extras):
            sys.exit(f"{problem}\n\nThe project could not be installed into {VENV}.")
        if not _has(modules):
            sys.exit(f"{VENV} is damaged. Remove it and run the same command again.")
    os.execv(PYTHON, [str(PYTHON), *sys.orig_argv[1:]])


def install(extras: str) -> str:
    """Install the project, in place and with these extras, into `.venv`.

    Returns what pip said where it failed, else nothing.
    """
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    command: list[str | Path] = [PYTHON, "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "--editable", target]
    return _complaint(command)


def is_own_environment() -> bool:
    """Whether this interpreter is the one of `.venv`."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _has(modules: tuple[str, ...]) -> bool:
    """Whether `.venv` is there and has all modules."""
    if not PYTHON.exists():
        return False
    imports = "; ".join(f"import {name}" for name in modules)
    result = subprocess.run([PYTHON, "-c", imports], capture_output=True, cwd=ROOT)
    return result.returncode == 0


def _make_environment() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"{sys.executable} cannot make a virtual environment: it lacks ensurepip.\n"
            f"On Debian and Ubuntu: apt-get install python{version}-venv"
        )
    if problem := _complaint([sys.executable, "-m", "venv", VENV]):
        sys.exit(f"{problem}\n\n{VENV} could not be made. If it is there, remove it.")


def _complaint(command: list[str | Path]) -> str:
    """Return what the command said if it failed, else nothing."""
    result = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return result.stdout.strip() if result.returncode else ""
