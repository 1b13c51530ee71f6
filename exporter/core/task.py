"""What an engine is for: generating text, or telling labels apart by the logits of one position."""

from dataclasses import dataclass

from exporter.core.errors import InputError

GENERATE_KIND, CLASSIFY_KIND = "generate", "classify"
TASKS = (GENERATE_KIND, CLASSIFY_KIND)


@dataclass(frozen=True)
class Task:
    """`generate`, or `classify` with at least two labels: engines of it take a prompt in and give one logit for each
    of `labels`, that of its token in `token_ids` after the last position of the prompt."""

    kind: str = GENERATE_KIND
    labels: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise InputError("usage.task", f"unknown task {self.kind!r}", f"use one of {', '.join(TASKS)}")
        if len(self.labels) != len(self.token_ids) or bool(self.labels) != self.classifies:
            what = f"task {self.kind} with {len(self.labels)} labels and {len(self.token_ids)} tokens"
            raise InputError("usage.task", what, "a classifier has one token for each label")

    @property
    def classifies(self) -> bool:
        return self.kind == CLASSIFY_KIND

    def describe(self) -> str:
        """For people: `classify safe (token 4345), unsafe (token 9187)`."""
        labels = (f"{label} (token {token})" for label, token in zip(self.labels, self.token_ids, strict=True))
        return f"{self.kind} {', '.join(labels)}".strip()


GENERATE = Task()
