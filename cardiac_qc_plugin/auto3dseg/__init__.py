"""The segmentation bundles as algorithms of MONAI's Auto3DSeg, and an ensemble with an uncertainty map.

``TEMPLATES`` is the folder of the algorithm templates: ``AutoRunner(templates_path_or_url=str(TEMPLATES))``.
"""

from .algo import TEMPLATES, BayesianAlgo
from .ensemble import UncertaintyEnsemble
from .fold import Fold, FoldInferer

__all__ = ["TEMPLATES", "BayesianAlgo", "Fold", "FoldInferer", "UncertaintyEnsemble"]
