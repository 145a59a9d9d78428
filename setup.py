"""Metadata is in pyproject.toml; the compiled library will be declared here."""

from setuptools import setup

setup()
