"""Read-only: the job that this process belongs to, from the variables of Slurm, MPI and Kubernetes.

`detect_cluster` reads them into one value: which settings of a launch they determine, and whether each task of the job
is a whole machine, on which the launcher starts ranks, or a single rank.
"""

from __future__ import annotations

from paceline.launch.clusters.cluster import Cluster, check_against
from paceline.launch.clusters.detection import detect_cluster

__all__ = ["Cluster", "check_against", "detect_cluster"]
