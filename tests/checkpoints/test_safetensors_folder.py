"""Folders of safetensors: read and written as the library does, and refused with a line where they are damaged."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.append(str(Path(__file__).parents[1]))
import released_models

from lightning_jax.checkpoints import safetensors_folder
from lightning_jax.checkpoints.safetensors_folder import INDEX, WHOLE, SafetensorsError, open_folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_those_that_the_library_wrote(tmp_path, dtype):
    tensors = released_models.weights(released_models.LLAMA, dtype)
    released_models.write(tmp_path, released_models.LLAMA, tensors, shards=3)
    found = open_folder(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name].read(0, tensor.shape), tensor)


def test_rows_and_columns_are_read_alone(tmp_path):
    tensors = {"a": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4), "b": np.arange(5, dtype=np.float32)}
    released_models.write(tmp_path, {}, tensors)
    found = open_folder(tmp_path)
    np.testing.assert_array_equal(found["a"].read(2, (3, 4)), tensors["a"].reshape(6, 4)[2:5])
    np.testing.assert_array_equal(found["a"].read(2, (3, 4), slice(1, 3)), tensors["a"].reshape(6, 4)[2:5, 1:3])
    np.testing.assert_array_equal(found["b"].read(2, (3,)), tensors["b"][2:])


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_the_library_reads_what_was_written_block_by_block(tmp_path, shard_bytes):
    tensors = released_models.weights(released_models.RELEASED, "bfloat16")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    planned = safetensors_folder.plan(tmp_path, shapes, shard_bytes=shard_bytes)
    safetensors_folder.create(planned)
    for name, tensor in tensors.items():
        for row, block in enumerate(tensor):
            planned[name].write(row, block)
    safetensors_folder.write_index(tmp_path, planned)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (tmp_path / INDEX).exists() == (shard_bytes == 3000)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].tobytes() == tensor.tobytes()
    assert open_folder(tmp_path) == planned


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(first=0, last=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(12), "it is truncated"),
        ({"a": entry()}, bytes(20), "something was added"),
        ({"a": entry(), "b": entry(8, 24)}, bytes(24), "tensor b overlaps another"),
        ({"a": entry(), "b": entry(20, 36)}, bytes(36), "tensor b leaves a gap before it"),
        ({"a": entry(dtype="I64", last=32)}, bytes(32), "tensor a is I64; weights are F32, BF16, F16"),
        ({"a": entry(shape=(5,))}, bytes(16), "has 16 bytes; F32 [5] are 20 bytes"),
        ({"a": entry(shape=(-4,))}, bytes(16), "has no dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, b"", "has no dtype, shape and data_offsets"),
        ([1], b"", "its header is not a JSON object"),
        (b"\xff\xfe", b"", "its header is not JSON"),
        (b'{"a": 1, "a": 2}', b"", "a name is there twice"),
    ],
)
def test_a_damaged_file_has_its_line(tmp_path, header, data, message):
    write_raw(tmp_path / WHOLE, header, data)
    with pytest.raises(SafetensorsError) as error:
        open_folder(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / WHOLE) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    for content in (struct.pack("<Q", 2**62) + b"{}", b"abc"):
        (tmp_path / WHOLE).write_bytes(content)
        with pytest.raises(SafetensorsError, match=r"longer than the file \(\d"):
            open_folder(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x.bin", ".."])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SafetensorsError, match="is no safetensors file of the folder"):
        open_folder(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed_but_the_hub_caches_own_are(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "model"
    released_models.write(elsewhere, {}, {"a": np.zeros(4, np.float32)})
    folder.mkdir()
    (folder / WHOLE).symlink_to(elsewhere / WHOLE)
    with pytest.raises(SafetensorsError, match="outside the folder; it is not followed"):
        open_folder(folder)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (elsewhere / WHOLE).rename(tmp_path / "hub" / "blobs" / "123")
    (snapshot / WHOLE).symlink_to("../../blobs/123")
    assert open_folder(snapshot).keys() == {"a"}


def test_every_shard_that_is_wrong_has_its_line(tmp_path):
    released_models.write(tmp_path, {}, {name: np.zeros(4, np.float32) for name in "abcd"}, shards=4)
    (tmp_path / "model-00001-of-00004.safetensors").unlink()
    write_raw(tmp_path / "model-00002-of-00004.safetensors", {"b": entry()}, bytes(8))
    write_raw(tmp_path / "model-00003-of-00004.safetensors", {"x": entry()}, bytes(16))
    with pytest.raises(SafetensorsError) as error:
        open_folder(tmp_path)
    lines = str(error.value).replace(str(tmp_path), "").splitlines()
    assert lines == [
        "/model-00001-of-00004.safetensors: missing",
        "/model-00002-of-00004.safetensors: 78 bytes, its header describes 86; it is truncated",
        "/model-00003-of-00004.safetensors: its tensor x is not in the index",
        "/model-00003-of-00004.safetensors: tensor c of the index is not in it",
    ]


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SafetensorsError, match=r"pytorch_model.bin is a pickle, which runs code"):
        open_folder(tmp_path)
