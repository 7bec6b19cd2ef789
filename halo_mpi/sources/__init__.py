"""Other programs' model files (GGUF, Hugging Face folders), read a slice at a time under one set of names."""

from pathlib import Path

from halo_mpi.errors import InputError
from halo_mpi.sources.source import Source

__all__ = ["Source", "open_source"]


def open_source(path: Path) -> Source:
    """Open a .gguf file, or a Hugging Face folder of config.json, safetensors and tokenizer.json.

    Sizes, names and shapes are checked here; weights are read when a slice of them is asked for.

    Raises InputError for anything else, and DamagedFileError for a file that disagrees with itself.
    """
    path = Path(path)
    try:
        if path.is_dir():
            from halo_mpi.sources.huggingface import open_huggingface

            return open_huggingface(path)
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        if path.is_file() and _looks_like_gguf(path):
            from halo_mpi.sources.gguf import open_gguf

            return open_gguf(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise InputError(f"{path}: expected a .gguf file or a Hugging Face folder (config.json, safetensors and tokenizer.json)")


def _looks_like_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
