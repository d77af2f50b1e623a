"""Damaged, truncated, foreign and hostile model files: a sentence, and an untouched model."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qkernels as qk
from qkernels.io import ModelFileError, read_header


def architecture():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file, and the outputs of its model."""
    model = architecture()
    with torch.no_grad():
        model[1].weight.mul_(2)
    qk.quantize_(model, {"*": qk.W4A8(8), "0": qk.W8A16()})
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    qk.save_model(model, path)
    return path.read_bytes(), model(torch.arange(20))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "m.safetensors"


def refuses_or_loads_all(data, workplace, expected):
    """Loading is refused with one sentence and changes nothing, or gives the saved model."""
    workplace.write_bytes(data)
    model = architecture()
    before = dict(model.named_modules())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        qk.load_model(model, workplace)
    except ModelFileError as error:
        assert str(error)
        assert "\n" not in str(error)
        assert dict(model.named_modules()) == before
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        return False
    assert torch.equal(model(torch.arange(20)), expected)
    return True


def test_the_good_file_is_good(good, workplace):
    assert refuses_or_loads_all(good[0], workplace, good[1])


@given(st.data())
def test_every_truncation_is_refused(good, workplace, data):
    length = data.draw(st.integers(0, len(good[0]) - 1))
    assert not refuses_or_loads_all(good[0][:length], workplace, good[1])


@given(st.data())
def test_any_changed_byte_is_noticed_or_harmless(good, workplace, data):
    changed = bytearray(good[0])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] ^= data.draw(st.integers(1, 255))
    refuses_or_loads_all(bytes(changed), workplace, good[1])


def test_every_flipped_bit_of_the_tensors_is_noticed(good, workplace):
    content, expected = good
    (length,) = struct.unpack("<Q", content[:8])
    for position in range(8 + length, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        assert not refuses_or_loads_all(bytes(changed), workplace, expected)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(good, workplace, data):
    assert not refuses_or_loads_all(data, workplace, good[1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(node, path=()):
    """Every position in a JSON document."""
    yield path
    if isinstance(node, dict | list):
        children = node.items() if isinstance(node, dict) else enumerate(node)
    else:
        children = ()
    for key, child in children:
        yield from places(child, (*path, key))


def with_document(content, change):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    document = change(json.loads(header["__metadata__"]["qkernels"]))
    header["__metadata__"]["qkernels"] = (
        document if isinstance(document, str) else json.dumps(document)
    )
    return with_header(content, json.dumps(header).encode())


def with_header(content, text):
    (length,) = struct.unpack("<Q", content[:8])
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@given(st.data())
def test_any_change_of_the_metadata_is_noticed_or_harmless(good, workplace, data):
    def change(document):
        path = data.draw(st.sampled_from(sorted(filter(len, places(document)), key=repr)))
        node = document
        for key in path[:-1]:
            node = node[key]
        if data.draw(st.booleans()) and isinstance(node, dict):
            del node[path[-1]]
        else:
            node[path[-1]] = data.draw(json_values)
        return document

    # A changed dtype or activation describes another model, which loads as such.
    workplace.write_bytes(with_document(good[0], change))
    model = architecture()
    before = dict(model.named_modules())
    try:
        qk.load_model(model, workplace)
    except ModelFileError as error:
        assert "\n" not in str(error)
        assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: b"", ["cut short"]),
        (lambda c: b"\x80\x04\x95" + c[3:], ["not a safetensors file, or is cut short"]),
        (lambda c: struct.pack("<Q", 1 << 62) + c[8:], [str(1 << 62)]),
        (lambda c: with_header(c, b"[1, 2]"), ["no JSON object"]),
        (lambda c: with_header(c, b"{" * 50_000), ["not a safetensors file"]),
        (lambda c: with_header(c, b"[" * 200_000), ["not a safetensors file"]),
        (lambda c: with_header(c, b'{"a": NaN}'), ["NaN is not a JSON number"]),
        (lambda c: with_header(c, b"\xff\xfe{}"), ["not a safetensors file"]),
        (lambda c: with_header(c, b'{"__metadata__": {"format": "pt"}}'), ["no qkernels metadata"]),
        (lambda c: with_header(c, b'{"__metadata__": 3}'), ["no qkernels metadata"]),
        (lambda c: c + b"more", ["damaged"]),
        (lambda c: with_document(c, lambda d: "[" * 200_000), ["damaged qkernels metadata"]),
        (lambda c: with_document(c, lambda d: {**d, "version": 99}), ["upgrade"]),
        (lambda c: with_document(c, lambda d: {**d, "fused": {"1": "2"}}), ["fused names '2'"]),
        (lambda c: with_document(c, lambda d: {**d, "fused": []}), ["damaged"]),
        (lambda c: with_document(c, lambda d: {**d, "version": "1"}), ["version is '1'"]),
        (lambda c: with_document(c, lambda d: {**d, "crc32": {}}), ["damaged", "checksum"]),
        (lambda c: with_document(c, lambda d: {**d, "tied": {"1.weight": "3.weight"}}), ["fit"]),
    ],
)
def test_damage_is_told_apart(good, workplace, damage, words):
    workplace.write_bytes(damage(good[0]))
    with pytest.raises(ModelFileError) as caught:
        qk.load_model(architecture(), workplace)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(workplace) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", {"scheme": "W4A8", "group_size": 10**30}),
        ("scheme", {"scheme": "W4A8", "group_size": 0}),
        ("scheme", {"scheme": "__class__"}),
        ("shape", [1 << 62, 1 << 62]),
        ("shape", [-1, 16]),
        ("shape", [12, 16, 1]),
        ("shape", [12.0, 16]),
        ("kind", "QModule"),
        ("kind", "os.system"),
        ("dtype", "int8"),
        ("dtype", "load"),
    ],
)
def test_hostile_entries_are_refused(good, workplace, field, value):
    def change(document):
        document["modules"]["1"][field] = value
        return document

    assert not refuses_or_loads_all(with_document(good[0], change), workplace, good[1])


def test_missing_file_folder_and_foreign_files(tmp_path):
    with pytest.raises(ModelFileError, match="No such file"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(ModelFileError, match=r"Is a directory|is not a file"):
        read_header(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(architecture().state_dict(), foreign)
    with pytest.raises(ModelFileError, match=r"not written by save_model.*quantize"):
        qk.load_model(architecture(), foreign)
    pickled = tmp_path / "pickled.pt"
    torch.save(architecture().state_dict(), pickled)
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        qk.load_model(architecture(), pickled)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="is not a file"):
        read_header(tmp_path / "pipe")
