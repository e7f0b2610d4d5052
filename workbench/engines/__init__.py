"""Where work is run: in this process, or spread over replicas of a model by Ray. The result is the same.

`with open_engine("ray", workers=4) as engine:` gives what `engine.Engine` promises; `workbench.cli_engine` has its options.
"""

from .engine import NAMES, Engine, Recipe, in_order, open_engine
from .local import LocalEngine

__all__ = ["NAMES", "Engine", "LocalEngine", "Recipe", "in_order", "open_engine"]
