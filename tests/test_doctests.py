"""The examples in the docstrings of every module of the package print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import fxzip

MODULES = [found.name for found in pkgutil.walk_packages(fxzip.__path__, "fxzip.") if "__main__" not in found.name]


@pytest.mark.parametrize("name", ["fxzip", *MODULES])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_most_modules_have_examples():
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(any(own.examples for own in tests) for tests in found) > len(MODULES) / 2
