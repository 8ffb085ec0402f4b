"""What schedulers of clusters know about the job that this process belongs to, and how they start one.

`detect_cluster` reads the variables of Slurm, MPI and Kubernetes into one value: which settings of a launch they
decide, and whether each of their tasks is a whole machine, on which a launcher starts the ranks, or a rank itself.
"""

from __future__ import annotations

from paceline.launch.clusters.cluster import Cluster, check_against
from paceline.launch.clusters.detection import detect_cluster

__all__ = ["Cluster", "check_against", "detect_cluster"]
