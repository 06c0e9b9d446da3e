"""Settings of the example site: SQLite, and all that it writes lies under var/."""

import os
from pathlib import Path

import django

BASE = Path(__file__).resolve().parent
VAR = Path(os.environ.get("EXAMPLE_VAR", BASE / "var")).resolve()
VAR.mkdir(parents=True, exist_ok=True)

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "async_queue",
    "shop",
    "photos",
    "rates",
    "demo",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": VAR / "db.sqlite3",
        "OPTIONS": {
            "init_command": "PRAGMA journal_mode=WAL",
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
        },
        # A file, because the threads of the report share it.
        "TEST": {"NAME": VAR / "test.sqlite3"},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "urls"
STATIC_URL = "static/"
MEDIA_ROOT = VAR / "media"
SECRET_KEY = "known to everybody, so for this example only"
DEBUG = True
TIME_ZONE = "UTC"
USE_TZ = True

# Whoever serves the site runs its jobs too.
ASYNC_QUEUE = {"IN_PROCESS": True}

OUTBOX = VAR / "outbox"
if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "shop.outbox.EmailBackend",
            "OPTIONS": {"file_path": OUTBOX},
        }
    }
else:
    EMAIL_BACKEND = "shop.outbox.EmailBackend"
    EMAIL_FILE_PATH = OUTBOX

RATES_URL = os.environ.get("RATES_URL", "http://127.0.0.1:8765/")
