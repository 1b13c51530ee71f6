"""The files of an onnxruntime engine."""

MODEL, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
