"""What TensorRT says while it parses and builds: kept, cleaned of its source locations, and read for figures."""

import re
from typing import Any

from targets.tensorrt.kernel_report import HEADING

LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
ERRORS = ("INTERNAL_ERROR", "ERROR")
# `IBuilder::build...: Error Code 1: Myelin ([pass.cpp:1500: run_passes] MESSAGE In compileGraph at /_src/x.cpp:2012)`
ENVELOPE = re.compile(r"^.*?Error Code \d+: [^(]*\((.*)\)$", re.DOTALL)
PLACE_BEFORE = re.compile(r"^(\[[^\]]*\]\s*|\w+\.cpp:\d+: )")
PLACE_AFTER = re.compile(r"\.?\s+In \S+ at /\S+:\d+(?=$|\s|\))")
# A failed build without a driver is followed by this complaint of the cleaning up.
ECHO = ("cudaError 35",)
# The parser notes every int64 input, which is what they are meant to be.
USUAL = ("has Int64 binding",)
FIGURE = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")


class BuildLog:
    """Messages of one build, the oldest first, as (level, text)."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []

    def add(self, level: str, text: str) -> None:
        if level in LEVELS or text.startswith(HEADING):
            self.messages.append((level, text))

    @property
    def errors(self) -> list[str]:
        """Cleaned error messages, each once; those that only follow another are left out."""
        found = dict.fromkeys(clean(text) for level, text in self.messages if level in ERRORS)
        telling = [text for text in found if not any(echo in text for echo in ECHO)]
        return telling or list(found)

    @property
    def warnings(self) -> list[str]:
        texts = dict.fromkeys(clean(text) for level, text in self.messages if level == "WARNING")
        return [text for text in texts if not any(usual in text for usual in USUAL)]

    def figure(self, what: str) -> int:
        """The greatest `Total WHAT Memory` in bytes: the builder tells one for each profile. 0: it told none."""
        figures = (FIGURE.match(text) for _, text in self.messages)
        return max((int(found.group(2)) for found in figures if found and found.group(1) == what), default=0)


def clean(message: str) -> str:
    """A message without the names of TensorRT's sources and functions."""
    envelope = ENVELOPE.match(message.strip())
    text = envelope.group(1) if envelope else message.strip()
    text = PLACE_BEFORE.sub("", PLACE_AFTER.sub("", text))
    return re.sub(r"\s+", " ", text).strip()


def make_logger(module: Any, log: BuildLog) -> Any:
    """A logger of a TensorRT module that writes into a BuildLog; TensorRT keeps a pointer to it, so must the caller."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()
