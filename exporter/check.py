"""One finding of `enginesmith doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`remedy` is empty where nothing needs doing. Engines of some target can do without what is not `required`."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""
    required: bool = True
