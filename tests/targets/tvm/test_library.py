"""Finding the runtime, loading libraries, and the threads that are linked into them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import targets
from exporter.core.errors import ArtifactError, UnsupportedError
from targets.tvm import library
from targets.tvm.file_names import LIBRARY
from tests.targets.engines import random_ids, relative_l2
from tests.targets.tvm.runners import open_runner

ROOT = Path(targets.__file__).parents[1]


def has_workers(count: int) -> bool:
    """Whether that is their number, or becomes it: threads take their name, and leave, when the system lets them."""
    for _ in range(500):
        if workers() == count:
            return True
        time.sleep(0.01)
    return False


def workers() -> int:
    """Threads of this process that an engine has started."""
    return sum((task / "comm").read_text() == "engine-worker\n" for task in Path("/proc/self/task").iterdir())


def test_the_runtime_is_found_without_importing_tvm():
    path = library.runtime_path()
    assert path.name == "libtvm_runtime.so" and path.is_file()


def test_a_runtime_can_be_named(monkeypatch):
    path = library.runtime_path()
    for given in (path, path.parent):
        monkeypatch.setenv(library.RUNTIME_VARIABLE, str(given))
        assert library.runtime_path() == path
    monkeypatch.setenv(library.RUNTIME_VARIABLE, str(path.parent / "missing.so"))
    with pytest.raises(UnsupportedError) as error:
        library.runtime_path()
    assert error.value.kind == "tvm.missing" and "missing.so" in error.value.message


def test_a_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.delenv(library.RUNTIME_VARIABLE, raising=False)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as error:
        library.runtime_path()
    assert error.value.kind == "tvm.missing" and "enginesmith[tvm]" in error.value.remedy
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(UnsupportedError) as error:
        library.import_ffi()
    assert error.value.kind == "tvm.missing" and "enginesmith[tvm]" in error.value.remedy


def test_torch_stays_importable_and_the_environment_unchanged():
    script = (
        "import os, sys\nfrom targets.tvm.library import import_ffi\n"
        "before = dict(os.environ)\nfinders = len(sys.meta_path)\n"
        "import_ffi()\nassert 'torch' not in sys.modules\nassert dict(os.environ) == before\n"
        "assert len(sys.meta_path) == finders\nimport importlib.util\nassert importlib.util.find_spec('torch')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_does_not_load_is_an_artifact_error(tmp_path, content):
    (tmp_path / LIBRARY).write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        library.EngineLibrary(tmp_path / LIBRARY)
    assert error.value.kind == "tvm.load" and LIBRARY in error.value.message


def test_a_library_without_the_expected_functions(tvm_engine):
    with pytest.raises(ArtifactError) as error:
        library.EngineLibrary(tvm_engine().path / LIBRARY).function("missing")
    assert error.value.kind == "tvm.load" and "'missing'" in error.value.message


def test_threads_can_change_between_and_within_runners(tvm_engine):
    """Results do not depend on the number of threads; nobody's affinity changes; workers end with the library."""
    built = tvm_engine("gqa", "int4", "fp16")
    ids, lengths = random_ids(built.config, 1, 20), np.array([20])
    affinity = os.sched_getaffinity(0)
    results = []
    for threads in (1, 2, 5, 3):
        with open_runner(built, threads=threads) as runner:
            results.append(runner.prefill(ids, lengths))
            runner.decode(ids[:, 0], np.array([True]))
            assert has_workers(threads - 1)
        assert os.sched_getaffinity(0) == affinity
    del runner
    assert has_workers(0)
    for result in results[1:]:
        assert relative_l2(result, results[0]) <= 1e-5


def test_two_engines_in_two_threads_of_a_program(tvm_engine):
    """Both runners share one library: one has its workers, the other computes alone, nobody waits for ever."""
    built = tvm_engine("gqa", "int4", "fp16")
    ids, lengths = random_ids(built.config, 1, 20), np.array([20])
    with open_runner(built) as first, open_runner(built, threads=3) as second:
        want = first.prefill(ids, lengths)
        got: list[np.ndarray] = []

        def work(runner):
            got.extend(runner.prefill(ids, lengths) for _ in range(50))

        callers = [threading.Thread(target=work, args=(runner,)) for runner in (first, second)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert len(got) == 100
        assert max(relative_l2(each, want) for each in got) <= 1e-5


def test_a_forked_child_runs_alone_and_leaves(tvm_engine):
    built = tvm_engine("gqa", "int4", "fp16")
    ids, lengths = random_ids(built.config, 1, 20), np.array([20])
    with open_runner(built) as runner:
        want = runner.prefill(ids, lengths)
        child = os.fork()
        if not child:
            same = relative_l2(runner.prefill(ids, lengths), want) <= 1e-5
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_impossible_thread_counts_are_refused(tvm_engine, count):
    with pytest.raises(ValueError, match="from 1 to 4096"):
        library.EngineLibrary(tvm_engine().path / LIBRARY).use_threads(count)
