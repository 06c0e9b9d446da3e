"""A door for old tools: the metadata is in pyproject.toml."""

from setuptools import setup

setup()
