"""What is done with unlabelled data: batches, hook points and observers, moments per feature space.

`Calibration` and `PerModel` say where batches come from; `observe` runs the models and gives the moments.
"""

from .observer import observe
from .sources import Calibration, PerModel

__all__ = ["Calibration", "PerModel", "observe"]
