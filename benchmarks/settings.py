"""Django's settings for whatever is measured, as a project has them in production.

`benchmarks.places` says by the environment which database, and what else a system
needs to be there.
"""

import json
import os

DATABASES = {"default": json.loads(os.environ["BENCHMARKS_DATABASE"])}
INSTALLED_APPS = ["django.contrib.contenttypes", "benchmarks"]
SECRET_KEY = "for the benchmarks only"
DEBUG = False
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_wanted = json.loads(os.environ.get("BENCHMARKS_SETTINGS", "{}"))
INSTALLED_APPS += _wanted.pop("INSTALLED_APPS", [])
globals().update(_wanted)
