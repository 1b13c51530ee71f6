"""The task of a build, settled from the options and the checkpoint's tokenizer."""

from exporter.core.config import ModelConfig
from exporter.core.task import CLASSIFY_KIND, GENERATE, Task
from exporter.options import BuildOptions


def requested_task(options: BuildOptions, config: ModelConfig) -> Task:
    """`--task` with `--labels`; each label stands for the first of its tokens. Raises InputError."""
    if options.task != CLASSIFY_KIND:
        return GENERATE
    from exporter.labels import label_task

    return label_task(options.checkpoint, options.labels, config)
