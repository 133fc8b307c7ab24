"""From a trunk and a merge per space to the network: `plan` decides what is merged, `rewrite` emits it."""

from .emit import rewrite
from .module import ZippedModule
from .report import Report
from .zip_plan import ZipPlan, plan, planned

__all__ = ["Report", "ZipPlan", "ZippedModule", "plan", "planned", "rewrite"]
