"""The whole way from models to one network: `compile_zip`, and the parts of it that other tools share."""

from .options import Recipe
from .pipeline import assemble, compile_zip

__all__ = ["Recipe", "assemble", "compile_zip"]
