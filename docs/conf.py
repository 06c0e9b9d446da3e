"""Sphinx's settings: `sphinx-build -W docs docs/_build`."""

project = "async_queue"
copyright = "async_queue contributors"
html_theme = "alabaster"
exclude_patterns = ["_build"]
