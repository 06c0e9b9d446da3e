"""Django's settings for the tests: one environment variable, DB, picks the database."""

import json
import os
import tempfile
from pathlib import Path

databases = {
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": ":memory:",
        # A file, because worker threads and processes share it.
        "TEST": {"NAME": str(Path(tempfile.gettempdir()) / f"aq-{os.getpid()}.db")},
    },
    "postgres": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ.get("PGDATABASE", "test"),
        "HOST": os.environ.get("PGHOST", "127.0.0.1"),
        "PORT": os.environ.get("PGPORT", "5432"),
        "USER": os.environ.get("PGUSER", "postgres"),
        "PASSWORD": os.environ.get("PGPASSWORD", ""),
        "TEST": {"NAME": f"test_async_queue_{os.getpid()}"},
    },
    "mariadb": {
        "ENGINE": "django.db.backends.mysql",
        "NAME": "test",
        "HOST": os.environ.get("MYSQL_HOST", "127.0.0.1"),
        "PORT": os.environ.get("MYSQL_PORT", "3306"),
        "USER": os.environ.get("MYSQL_USER", "root"),
        "PASSWORD": os.environ.get("MYSQL_PASSWORD", ""),
        "OPTIONS": {"charset": "utf8mb4"},
        "TEST": {"NAME": f"test_async_queue_{os.getpid()}"},
    },
}
DATABASES = {"default": databases[os.environ.get("DB", "sqlite")]}
if name := os.environ.get("AQ_TEST_DATABASE"):  # see tests.process
    DATABASES["default"] |= {"NAME": name}
    DATABASES["default"] |= json.loads(os.environ.get("AQ_TEST_OPTIONS", "{}"))

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "async_queue",
    "tests",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
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
ROOT_URLCONF = "tests.urls"
ALLOWED_HOSTS = ["127.0.0.1"]
STATIC_URL = "/static/"
SECRET_KEY = "for the tests only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
if changed := os.environ.get("AQ_TEST_SETTINGS"):  # see tests.workers
    ASYNC_QUEUE = json.loads(changed)
