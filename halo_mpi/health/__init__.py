"""What `halo-mpi doctor` looks at before a run: one file per thing, each of which tells findings."""
