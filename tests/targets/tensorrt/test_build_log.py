"""TensorRT's messages, cleaned and read; those here were printed by TensorRT-RTX 1.7.1."""

from targets.tensorrt.build_log import BuildLog, clean

MYELIN = (
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) "
    "sm86, because the model contains HW-specific datatypes: fp8_e4m3. In compileGraph at "
    "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
)
API = (
    "IBuilder::buildSerializedNetworkToStream: Error Code 3: API Usage Error (layers.1.value.scatter: The output "
    "tensor must be a network output. In validate at /_src/optimizer/api/layers/kVCacheUpdateLayer.cpp:124)"
)
ECHO = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)


def test_places_in_sources_are_left_out() -> None:
    refused = "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3"
    assert clean(MYELIN) == refused
    assert clean(API) == "layers.1.value.scatter: The output tensor must be a network output"
    assert clean("WeightsContext.cpp:203: Failed to open file: /x/a.data") == "Failed to open file: /x/a.data"
    assert clean("plain words, (with brackets)") == "plain words, (with brackets)"


def test_errors_once_and_without_their_echo() -> None:
    log = BuildLog()
    for level, text in (("VERBOSE", "x"), ("ERROR", API), ("ERROR", API), ("ERROR", ECHO), ("WARNING", "careful")):
        log.add(level, text)
    assert log.errors == ["layers.1.value.scatter: The output tensor must be a network output"]
    assert log.warnings == ["careful"]
    alone = BuildLog()
    alone.add("ERROR", ECHO)
    assert len(alone.errors) == 1 and "cudaError 35" in alone.errors[0]


def test_usual_warnings_are_not_told() -> None:
    log = BuildLog()
    log.add("WARNING", "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.")
    assert log.warnings == []


def test_memory_is_that_of_the_greatest_profile() -> None:
    log = BuildLog()
    for size in (8201216, 8771584):
        log.add("INFO", f"Total Activation Memory: {size} bytes")
    log.add("INFO", "Total Weights Memory: 644224 bytes")
    assert log.figure("Activation") == 8771584 and log.figure("Weights") == 644224
    assert BuildLog().figure("Activation") == 0
