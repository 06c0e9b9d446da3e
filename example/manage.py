#!/usr/bin/env python3
"""The example site's commands; `python3 example/manage.py demo` is the first to try."""

import os
import sys
from pathlib import Path

from bootstrap import ensure


def main() -> None:
    ensure("django", "cronsim", "PIL", extras="example")
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
    # Not a default: another project's exported setting must not end up here.
    os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
