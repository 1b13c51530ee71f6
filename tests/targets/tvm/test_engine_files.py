"""engine.json read back, weights and caches in memory, and CPUs that cannot run an engine."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from exporter.core import machine
from exporter.core.errors import ArtifactError
from targets.tvm.cache import allocate_caches
from targets.tvm.engine_files import check_profile, read_index
from targets.tvm.file_names import INDEX, WEIGHTS
from targets.tvm.isa import PROFILES
from targets.tvm.pages import HUGE_PAGE, allocate_pages
from targets.tvm.weights import READ_BYTES, read_weights
from tests.targets.tvm.runners import open_runner, with_index


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _tensors(folder: Path) -> dict[str, object]:
    return json.loads((folder / INDEX).read_text())["tensors"]


def _vast() -> dict[str, object]:
    return {"dtype": "uint8", "shape": [2**30, 2**20], "offset": 0, "bytes": 2**50}


def test_pages_are_aligned_zeroed_and_lazy():
    size = 64 << 20
    before = resident_bytes()
    pages = allocate_pages(size)
    assert pages.ctypes.data % HUGE_PAGE == 0
    assert pages.shape == (size,) and pages.flags.writeable
    assert resident_bytes() - before < size // 4
    pages[: size // 2] = 1
    assert resident_bytes() - before < size * 3 // 4
    assert not pages[size // 2 :: 4096].any()
    del pages
    assert resident_bytes() - before < size // 4


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_the_files_bytes(tvm_engine, tmp_path, threads):
    built = tvm_engine()
    index = read_index(built.path)
    data = np.frombuffer((built.path / WEIGHTS).read_bytes(), np.uint8)
    weights = read_weights(built.path / WEIGHTS, index, threads)
    assert set(weights) == set(index.tensors)
    for name, entry in index.tensors.items():
        assert weights[name].ctypes.data % 64 == 0
        assert weights[name].shape == entry.shape and weights[name].dtype == entry.dtype
        raw = weights[name].reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(raw, data[entry.offset : entry.offset + entry.nbytes])


def test_a_large_file_is_read_whole(tvm_engine, tmp_path):
    """More than one piece for each thread, and an end inside a piece."""
    size = 3 * READ_BYTES + 4096 + 64
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    (tmp_path / WEIGHTS).write_bytes(data.tobytes())
    tensor = {"dtype": "uint8", "shape": [size], "offset": 0, "bytes": size}
    names = {"tensors": {"w": tensor}, "embedding": ["w"], "layers": [["w"], ["w"]], "head": ["w"]}
    (tmp_path / "engine").mkdir()
    index = read_index(with_index(tvm_engine(), tmp_path / "engine", **names).path)
    np.testing.assert_array_equal(read_weights(tmp_path / WEIGHTS, index, 2)["w"], data)


def test_a_short_weights_file_is_refused(tvm_engine, tmp_path):
    built = with_index(tvm_engine(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ArtifactError) as error:
        open_runner(built)
    assert error.value.kind == "tvm.weights" and "5000" in error.value.message


@pytest.mark.parametrize(
    ("kv_cache", "dtypes"),
    [("fp32", ["f4", "f4"]), ("fp16", ["f2", "f2"]), ("int8", ["i1", "i1", "f4", "f4"])],
)
def test_caches_have_the_layout_of_the_kernels(tvm_engine, kv_cache, dtypes):
    index = read_index(tvm_engine("gqa", "int4", kv_cache).path)
    caches = allocate_caches(index, batch=3, positions=33)
    assert len(caches) == index.num_layers
    seen = []
    for layer in caches:
        shapes = [(3, 2, 2, 16, 32), (3, 2, 64, index.value_width), (3, 2, 64), (3, 2, 64)]
        assert [tensor.shape for tensor in layer] == shapes[: len(dtypes)]
        assert [tensor.dtype for tensor in layer] == [np.dtype(name) for name in dtypes]
        for tensor in layer:
            assert tensor.ctypes.data % 64 == 0 and not tensor.any()
            seen.append((tensor.ctypes.data, tensor.ctypes.data + tensor.nbytes))
    seen.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(seen))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"layers": []},
        {"head": ["nothing"]},
        {"chunk": 0},
        {"hidden_size": "64"},
        {"cache": {"kind": "fp8", "block": 32, "value_width": 16}},
        {"tensors": {"w": {"dtype": "float64", "shape": [1], "offset": 0}}},
        {"tensors": {"w": {"dtype": "uint8", "shape": [1], "offset": 3}}},
        {"tensors": {"w": {"dtype": "uint8", "shape": [64], "offset": 0, "bytes": 63}}},
        {"tensors": []},
        {"vocab_size": 2**31},
        {"chunk": 10**9},
        {"layer_functions": ["layer", 1]},
        {"layer_functions": [["layer"], ["layer"]]},
        {"embedding": "w"},
        {"layers": [{}, {}]},
        {"profile": "mmx"},
    ],
)
def test_an_index_that_does_not_add_up_is_refused(tvm_engine, tmp_path, fields):
    with pytest.raises(ArtifactError) as error:
        open_runner(with_index(tvm_engine(), tmp_path, **fields))
    assert error.value.kind == "tvm.index"


@pytest.mark.parametrize(
    "fields",
    [{"cache": {"kind": "fp16", "block": 32, "value_width": 16}}, {"layers": [[], []]}, {"embedding": []}],
)
@pytest.mark.parametrize("hidden_states", [False, True])
def test_a_library_refuses_another_engines_index(tvm_engine, tmp_path, fields, hidden_states):
    """What adds up and yet is not this library's: refused by the library, before a kernel runs."""
    built = with_index(tvm_engine(), tmp_path, **fields)
    with open_runner(built, hidden_states=hidden_states) as runner, pytest.raises(ArtifactError) as error:
        runner.prefill(np.array([[3, 4]]), np.array([2]))
    assert error.value.kind == "tvm.call"


def test_weights_beyond_memory_are_refused_as_damage(tvm_engine, tmp_path):
    built = tvm_engine()
    name = read_index(built.path).head[-1]
    tensors = {"tensors": {**_tensors(built.path), name: _vast()}}
    with pytest.raises(ArtifactError) as error:
        open_runner(with_index(built, tmp_path, **tensors))
    assert error.value.kind == "tvm.weights"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1}', b"\xff", None])
def test_a_missing_or_broken_index_is_refused(tvm_engine, tmp_path, content):
    shutil.copytree(tvm_engine().path, tmp_path, dirs_exist_ok=True)
    (tmp_path / INDEX).unlink()
    if content is not None:
        (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        read_index(tmp_path)
    assert error.value.kind == "tvm.index"


@pytest.mark.parametrize("profile", PROFILES)
def test_a_cpu_that_lacks_a_feature_is_refused_by_its_name(monkeypatch, profile):
    """Every feature of every profile; nothing of the engine is loaded before."""
    isa = PROFILES[profile]
    monkeypatch.setattr(machine, "machine", lambda: isa.machine)
    monkeypatch.setattr(machine, "cpu_features", lambda: frozenset(isa.cpu_features))
    check_profile(profile)
    for feature in isa.cpu_features:
        monkeypatch.setattr(machine, "cpu_features", lambda lost=feature: frozenset(isa.cpu_features) - {lost})
        with pytest.raises(ArtifactError) as error:
            check_profile(profile)
        assert error.value.kind == "tvm.host" and error.value.message.endswith(f": {feature}")
    monkeypatch.setattr(machine, "machine", lambda: "riscv64")
    with pytest.raises(ArtifactError) as error:
        check_profile(profile)
    assert error.value.kind == "tvm.host"


def test_the_runner_refuses_another_cpus_engine(tvm_engine, tmp_path):
    foreign = "aarch64-neon" if machine.machine() == "x86_64" else "x86-64-v2"
    with pytest.raises(ArtifactError) as error:
        open_runner(with_index(tvm_engine(), tmp_path, profile=foreign))
    assert error.value.kind == "tvm.host" and foreign in error.value.message
