"""Renders one chat template, in a process of its own that `chat.py` starts and bounds. Imports only jinja2.

Standard input: one JSON object {"path", "template", "context", "cpu_seconds", "memory_bytes", "output_chars"}.
Standard output: {"text": ...} or {"error": ...}. The environment is that of
transformers' `apply_chat_template`: immutable sandbox, trimmed blocks, loop controls, `generation` blocks,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`.
"""

import json
import resource
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Bound this process: beyond the limits the kernel ends it, or an allocation fails.

    Neither can it open a file or a socket any more, nor start a process.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def make_environment() -> "ImmutableSandboxedEnvironment":
    """The sandbox that templates of published checkpoints are written for."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} ... {% endgeneration %} marks assistant text for training; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares an instance variable)

        def parse(self, parser: "Parser") -> "nodes.Node":
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    class StrictSandbox(ImmutableSandboxedEnvironment):
        """The sandbox, with an error where a template asks for what is forbidden, even if it does not use it."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
            raise jinja2.exceptions.SecurityError(f"{attribute!r} of a {type(obj).__name__} is out of reach")

    class SafeNamespace(jinja2.utils.Namespace):
        """A namespace whose attributes never begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, values = args[0], dict(*args[1:], **kwargs)
            for name in values:
                SafeNamespace._check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = StrictSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=SafeNamespace)
    return environment


def render(request: dict[str, Any]) -> str:
    """The rendered text; stops early at `output_chars`."""
    parts: list[str] = []
    length = 0
    for part in make_environment().from_string(request["template"]).generate(**request["context"]):
        parts.append(part)
        length += len(part)
        if length > request["output_chars"]:
            raise ValueError(f"it renders more than {request['output_chars']} characters")
    return "".join(parts)


def warm_up() -> None:
    """Load what jinja2 and the standard library load late; after the limits no file opens any more."""
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    make_environment().from_string("{{ strftime_now('%c') }}").render()


def main() -> None:
    """One request, one answer."""
    request = json.load(sys.stdin.buffer)
    sys.path.extend(request["path"])
    warm_up()
    limit(request["cpu_seconds"], request["memory_bytes"])
    try:
        answer = {"text": render(request)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
