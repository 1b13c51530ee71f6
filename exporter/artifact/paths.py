"""Paths inside an artifact: relative, plain, and never leaving the directory."""

MAX_PATH = 512
MAX_NAME = 200


def path_fault(path: str) -> str | None:
    """Why `path` (from a manifest or an ONNX file) may not be used inside an artifact; None if it may."""
    if not path:
        return "it is empty"
    if len(path) > MAX_PATH:
        return f"it is longer than {MAX_PATH} characters"
    if "\\" in path or ":" in path:
        return "it holds a backslash or a colon"
    if not path.isprintable():
        return "it holds control or unpaired characters"
    if path.startswith("/"):
        return "it is absolute"
    for name in path.split("/"):
        if name in ("", ".", ".."):
            return f"it has the part {name!r}"
        if len(name.encode()) > MAX_NAME:
            return f"a part is longer than {MAX_NAME} bytes"
    return None
