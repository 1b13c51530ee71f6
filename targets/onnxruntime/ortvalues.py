"""numpy arrays as ONNX Runtime tensors and back, without copies, also for types that numpy lacks."""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from calibration.codecs import pack_nibbles

if TYPE_CHECKING:
    import onnxruntime as ort

# onnx.TensorProto.DataType, written out so that running an engine does not need the onnx package.
FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 9, 10, 16, 21, 22
FLOAT8E4M3FN = 17
NUMPY_TYPES: dict[int, np.dtype] = {
    FLOAT: np.dtype(np.float32),
    UINT8: np.dtype(np.uint8),
    INT8: np.dtype(np.int8),
    INT32: np.dtype(np.int32),
    INT64: np.dtype(np.int64),
    BOOL: np.dtype(np.bool_),
    FLOAT16: np.dtype(np.float16),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    FLOAT8E4M3FN: np.dtype(np.uint8),
}
FOUR_BIT = (UINT4, INT4)


@dataclass(frozen=True)
class Feed:
    """Memory that ONNX Runtime can read in place as a tensor of `shape` and ONNX type `element_type`."""

    memory: np.ndarray
    shape: list[int]
    element_type: int

    @staticmethod
    def of(name: str, array: np.ndarray, element_type: int) -> "Feed":
        """Wrap an array, without a copy where it is contiguous; four-bit codes come one a byte and are packed.

        Raises TypeError when the array's dtype is not that of the input `name`.
        """
        if element_type in FOUR_BIT:
            if array.dtype.itemsize != 1:
                raise TypeError(f"{name}: four-bit codes come one a byte, not as {array.dtype}")
            return Feed(pack_nibbles(array.reshape(-1)), list(array.shape), element_type)
        if array.dtype != NUMPY_TYPES[element_type]:
            raise TypeError(f"{name}: expected {NUMPY_TYPES[element_type]}, got {array.dtype}")
        return Feed(np.ascontiguousarray(array), list(array.shape), element_type)

    def bind(self, binding: "ort.IOBinding", name: str) -> None:
        """Bind as an input; this object must outlive the run."""
        binding.bind_input(name, "cpu", 0, self.element_type, self.shape, self.memory.ctypes.data)


def to_numpy(value: "ort.OrtValue") -> np.ndarray:
    """A tensor of ONNX Runtime as an array of its own."""
    element_type = int(value.element_type())
    if element_type != BFLOAT16:
        array: np.ndarray = value.numpy()
        return array
    size = value.tensor_size_in_bytes()
    raw = (ctypes.c_ubyte * size).from_address(value.data_ptr()) if size else b""
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape()).copy()
