"""Weights on disk: records of encoded matrices in HDF5 files, each with its checksum. Knows neither MPI nor LLaMA."""
