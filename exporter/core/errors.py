"""The errors that enginesmith reports: each knows its exit code, a stable kind, and a remedy."""

from typing import Any, ClassVar


class EngineSmithError(Exception):
    """Base of every error a user can cause or meet; `exit_code` is the command line's contract.

    `kind` is a stable dotted word for machines (`checkpoint.truncated`), `message` says what happened
    with which values, `remedy` says what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.remedy = remedy

    def to_json(self) -> dict[str, object]:
        """The `error` object of the `--json` contract."""
        return {"exit_code": self.exit_code, "kind": self.kind, "message": self.message, "remedy": self.remedy}


class InputError(EngineSmithError):
    """Bad usage or bad input: files, config, recipe, text, output directory."""

    exit_code = 2


class UnsupportedError(EngineSmithError):
    """This target, recipe, architecture or host cannot do it."""

    exit_code = 3


class ParityError(EngineSmithError):
    """A numerical gate failed: the engine is not the model within its limits.

    `report` is the whole verification result as JSON-ready data, with `first_divergence` filled in;
    `verification` is the VerifyReport itself, for writing a page.
    """

    exit_code = 4

    def __init__(
        self,
        kind: str,
        message: str,
        remedy: str = "",
        report: dict[str, object] | None = None,
        verification: Any = None,
    ) -> None:
        super().__init__(kind, message, remedy)
        self.report = report or {}
        self.verification = verification


class ArtifactError(EngineSmithError):
    """The artifact is damaged, incompatible with this host, or not the expected one."""

    exit_code = 5


class BudgetError(EngineSmithError):
    """A budget was missed: coverage, expected fusions, size, memory, speed."""

    exit_code = 6
