"""halo_mpi: LLaMA-family inference over MPI on a handful of small computers joined by a bad network."""

__version__ = "0.1.0"
