"""A lossy network of small computers on one Linux machine: namespaces, real TCP, real mpirun, real losses."""
