"""The whole way from models to one network: `compile_zip`, and the parts of it that other tools share."""

from .pipeline import Recipe, assemble, compile_zip, survey

__all__ = ["Recipe", "assemble", "compile_zip", "survey"]
