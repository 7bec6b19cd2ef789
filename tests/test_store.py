"""Encodings, record files and the `.halo` folder."""

import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pagecache import drop, drop_records, resident, warm
from halo_mpi.errors import DiskFullError, DamagedFileError, HaloError, InputError, UsageError
from halo_mpi.store.encoding import DTYPES, Blocks, decode, decode_blocks, encode, encoded_bytes, quantize
from halo_mpi.store.layout import Part, RecordLayout
from halo_mpi.store.reader import RecordFile
from halo_mpi.store.writer import RecordFileWriter, new_folder

shapes = st.tuples(st.integers(1, 70), st.integers(1, 100))


def matrix(shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
def test_every_encoding_restores_the_matrix_within_its_precision(shape, dtype, seed):
    weights = matrix(shape, seed)
    data = np.frombuffer(encode(weights, dtype), np.uint8)
    assert data.size == encoded_bytes(*shape, dtype)
    error = np.abs(decode(data, *shape, dtype) - weights)
    reach = np.abs(weights).max()
    step = {"f32": 0, "f16": reach * 2**-11, "bf16": reach * 2**-8, "int8": reach / 127 * 0.51, "int4": 2 * reach * 0.17}
    assert error.max() <= step[dtype] + 1e-7


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), tail=st.floats(1, 30))
def test_the_fit_of_4_bit_blocks_is_never_worse_than_their_plain_range(rows, seed, tail):
    weights = matrix((rows, 64), seed)
    weights[:, 5] *= tail  # an outlier in one block of each row
    low, high = (
        bound.astype(np.float32)[..., None]
        for bound in (weights.reshape(rows, 2, 32).min(-1), weights.reshape(rows, 2, 32).max(-1))
    )
    low, scale = low.astype(np.float16).astype(np.float32), ((high - low) / 15).astype(np.float16).astype(np.float32)
    plain = np.rint((weights.reshape(rows, 2, 32) - low) / scale).clip(0, 15) * scale + low

    def squared_error(restored):
        return ((restored.reshape(rows, 2, 32) - weights.reshape(rows, 2, 32)) ** 2).sum(-1)

    assert (squared_error(quantize(weights, "int4").dequantize()) <= squared_error(plain) * 1.01 + 1e-9).all()


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 4), dtype=st.sampled_from(["int4", "int8"]), seed=st.integers(0, 99))
def test_blocks_pass_through_unchanged(rows, blocks, dtype, seed):
    original = quantize(matrix((rows, 32 * blocks), seed), dtype)
    restored = decode_blocks(np.frombuffer(encode(original, dtype), np.uint8), rows, 32 * blocks, dtype)
    assert np.array_equal(restored.codes, original.codes)
    assert np.array_equal(restored.scale, original.scale)
    assert dtype == "int8" or np.array_equal(restored.minimum, original.minimum)


def test_the_4_bit_tile_is_laid_out_as_documented():
    codes = np.arange(16 * 32).reshape(16, 32) % 16
    plane = np.zeros((16, 1), np.float16)
    data = np.frombuffer(encode(Blocks(codes.astype(np.uint8), plane, plane), "int4"), np.uint8)
    for j, row, i in np.ndindex(4, 16, 4):
        byte = data[(j * 16 + row) * 4 + i]
        assert (byte & 15, byte >> 4) == (codes[row, 8 * j + i], codes[row, 8 * j + 4 + i])


def test_the_8_bit_tile_is_laid_out_as_documented():
    codes = (np.arange(16 * 32).reshape(16, 32) % 251 - 125).astype(np.int8)
    data = np.frombuffer(encode(Blocks(codes, np.zeros((16, 1), np.float16), None), "int8"), np.int8)
    for j, row, i in np.ndindex(8, 16, 4):
        assert data[(j * 16 + row) * 4 + i] == codes[row, 4 * j + i]


@pytest.mark.parametrize("dtype", ["f16", "int8", "int4"])
def test_a_weight_too_large_for_f16_is_refused(dtype):
    with pytest.raises(InputError, match="--dtype f32 or bf16"):
        encode(np.full((1, 32), 1e8, np.float32), dtype)


def write_file(path, layers=2, index=(0, 3, 5), meta=None):
    layout = RecordLayout([Part("a", 5, 7, "f32"), Part("b", 16, 64, "int4")])
    with RecordFileWriter(path) as writer:
        writer.add_table("things", layout, layers, list(index))
        for layer in range(layers):
            for entry in index:
                writer.write("things", layer, entry, layout.pack({"a": matrix((5, 7), layer), "b": matrix((16, 64), entry)}))
        return writer.close(meta or {"name": "test"})


def test_a_record_comes_back_as_written(tmp_path):
    digest = write_file(tmp_path / "file.h5")
    file = RecordFile(tmp_path / "file.h5")
    layout = file.tables["things"].layout
    assert np.array_equal(layout.unpack(file.read("things", 1, 3), "a"), matrix((5, 7), 1))
    assert np.array_equal(layout.unpack(file.read("things", 0, 5), "b"), quantize(matrix((16, 64), 5), "int4").dequantize())
    assert file.digest == digest
    assert file.meta == {"name": "test"}


def test_what_is_expected_comes_into_memory_though_nobody_reads_it(tmp_path):
    write_file(tmp_path / "file.h5", layers=200)
    file = RecordFile(tmp_path / "file.h5")
    drop(tmp_path)
    if resident(tmp_path):
        pytest.skip("this file system keeps pages that it is asked to forget")
    file.expect("things", 100, 3)
    until = time.monotonic() + 10
    while not resident(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert resident(tmp_path) < 0.1, "and nothing of the rest with it"


def test_a_layers_records_are_dropped_alone(tmp_path):
    write_file(tmp_path / "file.h5", layers=200)
    file = RecordFile(tmp_path / "file.h5")
    warm(tmp_path)
    drop_records(SimpleNamespace(shards={0: file}), 100, {"things", "others"})
    if (left := resident(tmp_path)) == 1.0:
        pytest.skip("this file system keeps pages that it is asked to forget")
    assert 0.95 < left < 1.0


def test_a_record_smaller_than_its_part_is_padded_with_zeros():
    layout = RecordLayout([Part("a", 5, 64, "int8")])
    weights = matrix((3, 32))
    for stored in (weights, quantize(weights, "int8")):
        restored = layout.unpack(layout.pack({"a": stored}), "a")
        assert np.allclose(restored[:3, :32], weights, atol=0.02)
        assert not restored[3:].any() and not restored[:, 32:].any()


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Structure, metadata, checksums and records: what is read is what was written, or the error is a clear one."""
    path, damaged = tmp_path / "file.h5", tmp_path / "damaged.h5"
    write_file(path)
    original = path.read_bytes()
    expected = read_all(path)
    random = np.random.default_rng(7)
    places = {*range(0, 600), *random.integers(0, len(original), 1500).tolist()}
    refused = 0
    for place in sorted(places):
        content = bytearray(original)
        content[place] ^= 1 << int(random.integers(8))
        damaged.write_bytes(content)
        try:
            assert read_all(damaged) == expected, f"byte {place} of {len(original)} changes what is read"
        except (DamagedFileError, InputError) as error:
            assert "damaged.h5" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 200


def test_a_truncated_file_is_refused(tmp_path):
    path, damaged = tmp_path / "file.h5", tmp_path / "damaged.h5"
    write_file(path)
    original = path.read_bytes()
    for length in {*range(0, len(original), 61), len(original) - 1}:
        damaged.write_bytes(original[:length])
        with pytest.raises(DamagedFileError, match="damaged.h5"):
            read_all(damaged)


def read_all(path) -> bytes:
    file = RecordFile(path)
    try:
        return (
            b"".join(
                file.read(name, layer, entry).tobytes()
                for name, table in sorted(file.tables.items())
                for layer in range(len(table.crc32))
                for entry in sorted(table.positions)
            )
            + repr(sorted(file.meta.items())).encode()
        )
    finally:
        file.close()


def test_the_error_names_file_layer_and_entry_of_a_damaged_record(tmp_path):
    path = tmp_path / "file.h5"
    write_file(path)
    offset = int(RecordFile(path).tables["things"].offsets[1, 2])
    with open(path, "r+b") as file:
        file.seek(offset + 10)
        file.write(b"\xff\xfe")
    with pytest.raises(DamagedFileError, match=r"file\.h5 is damaged at layer 1, things 5"):
        RecordFile(path).read("things", 1, 5)


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    final = tmp_path / "new.halo"
    with pytest.raises(KeyboardInterrupt):
        with new_folder(final, 0, "whole") as folder:
            (folder / "half").write_text("half")
            assert not final.exists()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(final, 0, "whole") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new.halo"]


def test_an_existing_folder_is_not_replaced_unasked(tmp_path):
    old = tmp_path / "old.halo"
    old.mkdir()
    (old / "model").write_text("old")
    with pytest.raises(UsageError, match="--force"):
        with new_folder(old, 0, "model"):
            pass
    with new_folder(old, 0, "model", replace=True) as folder:
        (folder / "model").write_text("new")
    assert (old / "model").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["old.halo"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "plain").write_text("x")
    for name in ("precious", "plain"):
        with pytest.raises(UsageError, match="no folder made by this command"):
            with new_folder(tmp_path / name, 0, "model.h5", replace=True):
                pass
    assert (tmp_path / "precious" / "file").exists() and (tmp_path / "plain").exists()


def test_too_little_disk_space_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(DiskFullError, match="MB free"):
        with new_folder(tmp_path / "big.halo", shutil.disk_usage(tmp_path).total * 2, "model"):
            pytest.fail("the body must not run")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with pytest.raises(HaloError, match="full") as failure:
            with new_folder(small / "model.halo", 0, "model") as folder:
                write_file(folder / "file.h5", layers=200)
        assert failure.value.exit_code == 1
        assert list(small.iterdir()) == []
    finally:
        os.system(f"umount {small}")
