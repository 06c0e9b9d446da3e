"""``python -m benchmarks.inside module:function '[args]'``: see `places.Place.call`."""

import json
import sys
from importlib import import_module

import django


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    django.setup()
    function = getattr(import_module(module), name)
    print(json.dumps(function(*json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
