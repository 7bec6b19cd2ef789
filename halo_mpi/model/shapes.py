"""Shapes of well-known models, for planning without their weights. Sources: the `config.json` of each on its publisher's page."""

from halo_mpi.model.config import ModelConfig

SHAPES = {
    "smollm2-135m": ModelConfig("SmolLM2-135M shape", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 100000.0, tied=True),
    "tinyllama": ModelConfig("TinyLlama-1.1B shape", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 1e-5, 10000.0),
    "llama-2-7b": ModelConfig("Llama-2-7B shape", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e-5, 10000.0),
    "llama-2-13b": ModelConfig("Llama-2-13B shape", 40, 5120, 40, 40, 128, 13824, 32000, 4096, 1e-5, 10000.0),
    "llama-2-70b": ModelConfig("Llama-2-70B shape", 80, 8192, 64, 8, 128, 28672, 32000, 4096, 1e-5, 10000.0),
}
