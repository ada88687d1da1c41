"""meshnode joins GPU hosts into one libp2p mesh: every request reaches the best free GPU.

Importing this package loads neither trio nor libp2p.
"""

from meshnode.core.clusterrouting import ReplicaCandidate, pick_best_replica
from meshnode.errors import MeshnodeError

__version__ = "0.2.0"

__all__ = ["MeshnodeError", "ReplicaCandidate", "__version__", "pick_best_replica"]
