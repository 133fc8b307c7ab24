"""The whole way from models to one network: `compile_zip`, and the parts of it that other tools share."""

from .assembling import assemble
from .options import Options, Recipe
from .pipeline import compile_zip
from .session import Candidate, Session

__all__ = ["Candidate", "Options", "Recipe", "Session", "assemble", "compile_zip"]
