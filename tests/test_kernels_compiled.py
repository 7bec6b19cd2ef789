"""Kernels as a machine gets them: chosen for its processor, compiled once, kept on disk."""

import subprocess
import sys
from dataclasses import replace

import pytest

from halo_mpi.errors import HaloError
from halo_mpi.model.kernels import compiled, processor
from halo_mpi.model.kernels.arm import NEON, NEON_DOTPROD
from halo_mpi.model.kernels.cache import cache_folder, kept
from halo_mpi.model.kernels.x86 import AVX2, AVX512_VNNI

PI_4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n\n"
PI_5 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def forbidden() -> bytes:
    raise AssertionError("compiled, though it is on the disk")


def test_what_was_compiled_once_is_read_from_the_disk(folder):
    assert kept(("processor", "source"), lambda: b"code") == b"code"
    assert kept(("processor", "source"), forbidden) == b"code"
    assert kept(("another processor", "source"), lambda: b"other code") == b"other code"
    assert kept(("processor", "source"), forbidden) == b"code"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", [lambda code: code[:-1], lambda code: b"", lambda code: code[:40] + b"?" + code[41:], lambda code: code + b"?"]
)
def test_a_damaged_file_is_compiled_anew(folder, damage):
    kept(("key",), lambda: b"code" * 100)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert kept(("key",), lambda: b"fresh") == b"fresh"
    assert kept(("key",), forbidden) == b"fresh"


def test_a_folder_that_cannot_be_written_is_no_error(folder):
    folder.parent.joinpath(folder.name).write_text("a file where the folder should be")
    assert kept(("key",), lambda: b"code") == b"code"


def test_a_file_that_cannot_be_replaced_leaves_no_draft(folder):
    kept(("key",), lambda: b"code")
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert kept(("key",), lambda: b"code") == b"code"
    assert list(folder.iterdir()) == [file]


def test_processes_that_start_at_once_all_get_their_kernels(folder):
    program = "from halo_mpi.model.kernels.compiled import products; print(products().int4[3] != 0)"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in started] == ["True\n"] * 2
    assert len(list(folder.iterdir())) == 1
    content = next(folder.iterdir()).read_bytes()[32:]
    this = processor.this_processor()
    assert compiled.object_code(this.isas[0], this) == content


def on(monkeypatch, machine: str, features: dict[str, bool], cpuinfo: str = "") -> processor.Processor:
    """What is found on some other machine."""
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor.llvm, "get_host_cpu_features", lambda: processor.llvm.FeatureMap(features))
    monkeypatch.setattr(processor.Path, "read_text", lambda path: cpuinfo)
    return processor.this_processor.__wrapped__()


def test_the_best_instruction_set_of_a_processor_is_found(monkeypatch):
    zen_3 = {"avx2": True, "fma": True, "f16c": True, "avx512f": False}
    assert on(monkeypatch, "x86_64", zen_3).isas == (AVX2,)
    zen_4 = {**zen_3, **dict.fromkeys(AVX512_VNNI.features, True)}
    assert on(monkeypatch, "x86_64", zen_4).isas == (AVX512_VNNI, AVX2)
    assert on(monkeypatch, "x86_64", {"avx": True}).isas == ()
    assert on(monkeypatch, "aarch64", {"neon": True}, PI_4 * 4).isas == (NEON,)
    assert on(monkeypatch, "aarch64", {"neon": True}, PI_5 * 4).isas == (NEON_DOTPROD, NEON)
    assert on(monkeypatch, "aarch64", {"neon": True}, PI_5 * 2 + PI_4 * 2).isas == (NEON,)
    assert on(monkeypatch, "riscv64", {}).isas == ()


def test_sdot_is_among_the_features_that_the_compiler_is_told(monkeypatch):
    assert "+dotprod" in on(monkeypatch, "aarch64", {"neon": True}, PI_5).features
    assert "dotprod" not in on(monkeypatch, "aarch64", {"neon": True}, PI_4).features


def test_a_processor_without_kernels_is_told_apart(monkeypatch):
    nothing = replace(processor.this_processor(), isas=())
    monkeypatch.setattr(compiled, "this_processor", lambda: nothing)
    assert compiled.supported() is None
    with pytest.raises(HaloError, match="lacks AVX2"):
        compiled.products.__wrapped__()


def test_products_are_compiled_once_per_process():
    assert compiled.supported() == compiled.products().isa
    assert compiled.products() is compiled.products()
