"""Starting a launch through Slurm or MPI: job scripts, mpirun, tasks."""
