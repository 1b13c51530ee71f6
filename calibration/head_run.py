"""The calibration of the head: statistics of the final norm's output, and codes of the head's rows, block by block."""

import torch

from calibration.accumulate import StatisticsAccumulator
from calibration.activation_store import Activations, batches
from calibration.coverage import actual_precision
from calibration.decoder import rms_norm
from calibration.matrix_algorithms import CodeChooser, Wanted, input_clip
from calibration.qparams_writer import QParamsWriter
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Recipe
from exporter.core.weights import read_tensor_rows

POINT, MODULE = "head_input", "lm_head"


@torch.inference_mode()
def run_head(checkpoint: Checkpoint, recipe: Recipe, hidden: Activations, batch: int, writer: QParamsWriter) -> None:
    """Give the writer what the head needs. hidden [n, S, H]: what leaves the last layer."""
    config = checkpoint.config
    precision = actual_precision(recipe.lm_head, config.hidden_size)
    wanted = Wanted.of(recipe, precision)
    gamma = torch.from_numpy(read_tensor_rows(checkpoint, "model.norm.weight", 0, config.hidden_size))
    n, length, width = hidden.shape
    gathered = StatisticsAccumulator("head input", width, n * length, hessian=wanted.hessian, sample=wanted.sample)
    for start, stop in batches(n, batch):
        gathered.add(rms_norm(torch.from_numpy(hidden.read(start, stop)), gamma, config.rms_norm_eps))
    statistics = gathered.finish()
    writer.add_input_amax(None, POINT, statistics.amax, input_clip(recipe, precision, statistics))
    chooser = CodeChooser(recipe, precision, statistics)
    if not chooser.chooses:
        return
    name, shape = config.head_source, checkpoint.tensors[config.head_source].shape
    writer.add_codes(name, chooser.blocks(shape, lambda start, stop: read_tensor_rows(checkpoint, name, start, stop)))
    if chooser.report:
        writer.add_report(MODULE, chooser.report)
