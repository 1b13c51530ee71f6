"""Whether the TensorRT that was found really builds: one layer, in this process, in well under a second for RTX."""

from targets.tensorrt.build_log import BuildLog, make_logger
from targets.tensorrt.toolkit import Toolkit

ANY_CAPABILITY = "SM89"


def build_one_layer(toolkit: Toolkit) -> str:
    """Why a network of one layer does not build; empty where it does. Needs the GPU that TensorRT builds for; RTX needs
    none."""
    module, log = toolkit.module, BuildLog()
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    given = network.add_input("x", module.DataType.HALF, (1, 8))
    network.mark_output(network.add_activation(given, module.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    if toolkit.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(module.ComputeCapability, ANY_CAPABILITY), 0)
    if builder.build_serialized_network(network, config) is not None:
        return ""
    return "; ".join(log.errors) or "the builder gives no reason"
