"""Builds the package; everything declarative is in pyproject.toml. The place where the optional C++ extension (csrc/) will be added."""

from setuptools import setup

setup()
