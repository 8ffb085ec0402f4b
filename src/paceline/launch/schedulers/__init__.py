"""Starting ranks through other programs: sbatch, mpirun, DeepSpeed's launcher, and the tasks of a scheduler."""
