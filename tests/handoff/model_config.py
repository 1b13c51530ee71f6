"""The part of Triton's model_config.proto that our files use, built by hand, to read config.pbtxt with protobuf itself.

Names, numbers and types from triton-inference-server/common protobuf/model_config.proto; test_triton_config.py compares
them with the published descriptors where the package `tritonclient` is there.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

STRING, INT32, INT64, UINT32, UINT64, BOOL, FLOAT = (
    getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name}")
    for name in ("STRING", "INT32", "INT64", "UINT32", "UINT64", "BOOL", "FLOAT")
)
REPEATED = True

ENUMS = {
    "DataType": (
        *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8"),
        *("TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16"),
    ),
    "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
# message -> {field: (number, type or name of a message or enumeration, repeated)}
MESSAGES: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "ModelTensorReshape": {"shape": (1, INT64, True)},
    "ModelInput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (4, INT64, True),
        "reshape": (5, "ModelTensorReshape", False),
        "optional": (8, BOOL, False),
    },
    "ModelOutput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (3, INT64, True),
        "label_filename": (4, STRING, False),
        "reshape": (5, "ModelTensorReshape", False),
    },
    "ModelInstanceGroup": {"count": (2, INT32, False), "kind": (4, "ModelInstanceGroup.Kind", False)},
    "ModelDynamicBatching": {"max_queue_delay_microseconds": (2, UINT64, False)},
    "ModelTransactionPolicy": {"decoupled": (1, BOOL, False)},
    "ModelParameter": {"string_value": (1, STRING, False)},
    "ModelConfig": {
        "name": (1, STRING, False),
        "platform": (2, STRING, False),
        "max_batch_size": (4, INT32, False),
        "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True),
        "instance_group": (7, "ModelInstanceGroup", True),
        "dynamic_batching": (11, "ModelDynamicBatching", False),
        "parameters": (14, "ModelConfig.ParametersEntry", True),
        "backend": (17, STRING, False),
        "model_transaction_policy": (19, "ModelTransactionPolicy", False),
    },
}


def _field(message: Any, name: str, number: int, kind: int | str, repeated: bool) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if isinstance(kind, int):
        field.type = kind
    else:
        field.type = field.TYPE_ENUM if kind in ENUMS else field.TYPE_MESSAGE
        field.type_name = f".subset.{kind}"


def _add_enum(values: Any, name: str) -> None:
    enum = values.add(name=name.split(".")[-1])
    for number, value in enumerate(ENUMS[name]):
        enum.value.add(name=value, number=number)


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="subset.proto", package="subset", syntax="proto3")
    _add_enum(file.enum_type, "DataType")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            _field(message, field, number, kind, repeated)
        if name == "ModelInstanceGroup":
            _add_enum(message.enum_type, "ModelInstanceGroup.Kind")
        if name == "ModelConfig":
            entry = message.nested_type.add(name="ParametersEntry")
            entry.options.map_entry = True
            _field(entry, "key", 1, STRING, False)
            _field(entry, "value", 2, "ModelParameter", False)
    return file


def _model_config() -> type:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    found: type = message_factory.GetMessageClass(pool.FindMessageTypeByName("subset.ModelConfig"))
    return found


ModelConfig: Any = _model_config()


def parse(text: str) -> Any:
    """A ModelConfig; raises text_format.ParseError for anything that Triton's parser would not take either."""
    return text_format.Parse(text, ModelConfig())
