"""Fresh interpreters: to start one with this one's settings, and to keep in touch.

A child is spawned, never forked: it inherits no connection, lock or thread. Its
standard input is the line to its parent, over which it is told words and hears, even
of a ``kill -9``, that the parent has gone. Used by ``supervisor`` and ``lone``.
"""

import json
import os
import pkgutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import django
from django.core.exceptions import ImproperlyConfigured

# In the child, before anything of the project can be imported.
_BOOT = (
    "import json, sys; line = open(0, 'rb', buffering=0, closefd=False); "
    "sys.path[:] = json.loads(line.readline()); "
    "from async_queue import processes; processes.begin()"
)
# sys.flags, and how they are written on a command line.
_FLAGS = {
    "bytes_warning": "b",
    "dont_write_bytecode": "B",
    "debug": "d",
    "ignore_environment": "E",
    "isolated": "I",
    "optimize": "O",
    "safe_path": "P",
    "no_user_site": "s",
    "no_site": "S",
}

_started: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
# In a child: the number of the file that is the line to its parent.
_line: int | None = None


def start(entry: str, *args: str) -> subprocess.Popen[bytes]:
    """Start an interpreter that sets Django up and calls ``entry(*args)``.

    ``entry`` is "module:function". The child has this process's flags, sys.path,
    environment and output. The arguments show in the list of processes: no secrets.
    Leave its standard input alone until it has ended, and close it then. Raises
    ImproperlyConfigured where no module holds the settings.
    """
    require_settings_module()
    process = subprocess.Popen(
        [sys.executable, *interpreter_flags(), "-c", _BOOT, entry, *args],
        stdin=subprocess.PIPE,
        bufsize=0,
        # Ctrl-C in a terminal is for the parent, which says what is to be done.
        process_group=0,
    )
    _started.add(process)
    # Path objects are no entries for Python; they would be in the child.
    tell(process, json.dumps([entry for entry in sys.path if isinstance(entry, str)]))
    return process


def require_settings_module() -> None:
    """Raise ImproperlyConfigured where a child would not find the settings."""
    if not os.environ.get("DJANGO_SETTINGS_MODULE"):
        raise ImproperlyConfigured(
            "worker processes need a settings module: set DJANGO_SETTINGS_MODULE, "
            "for they know nothing of settings.configure()"
        )


def interpreter_flags() -> list[str]:
    """Return the arguments that give another interpreter this one's flags."""
    counts = {letter: getattr(sys.flags, name) for name, letter in _FLAGS.items()}
    letters = [f"-{letter * count}" for letter, count in counts.items() if count]
    warnings = [f"-W{option}" for option in sys.warnoptions]
    given = getattr(sys, "_xoptions", {})  # documented, for CPython
    options = [
        f"-X{key}" if value is True else f"-X{key}={value}"
        for key, value in given.items()
    ]
    return letters + warnings + options


def tell(process: subprocess.Popen[bytes], word: str) -> None:
    """Say a word to a child; nothing happens if it has ended."""
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.write(f"{word}\n".encode())


def begin() -> None:
    """Be a child that `start` has started."""
    global _line
    # A job that reads its input, or starts a process that does, finds it empty.
    _line = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _, entry, *args = sys.argv
    django.setup()
    pkgutil.resolve_name(entry)(*args)


def when_told(callback: Callable[[str], object]) -> None:
    """Call back with each word that the parent says, and with "" once it has gone.

    For a child, once, from its entry. The calls come in a thread of their own, which
    keeps no process alive.
    """
    if _line is None:
        raise RuntimeError("only a process that processes.start() made has a parent")
    Thread(
        target=_hear, args=(_line, callback), name="async_queue-line", daemon=True
    ).start()


def when_orphaned(callback: Callable[[], object]) -> None:
    """Call back once the parent has gone, however it ended; see `when_told`."""
    when_told(lambda word: word or callback())


def _hear(line: int, callback: Callable[[str], object]) -> None:
    # Unbuffered: at its end, Python would wait for the lock of a buffer.
    with open(line, "rb", buffering=0) as words:
        while word := words.readline():
            callback(word.decode().strip())
    callback("")


def memory() -> int:
    """Return the bytes that this process keeps in memory, or 0 where nothing tells.

    Outside of Linux it is the most that it has ever kept.
    """
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_children() -> None:
    """Let go of the lines to the parent's children, who could not hear it die."""
    for process in list(_started):
        if process.stdin is not None:
            process.stdin.close()
    _started.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_children)
