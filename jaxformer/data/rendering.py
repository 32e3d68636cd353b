"""A process that renders chat templates: strangers' Jinja2, sandboxed, in bounded memory, unable to write a file.

A request is a line of JSON, {"template", "messages", "add_generation_prompt", ...}; the answer is {"text"} or
{"error"}. Who asks bounds the time.
"""

import contextlib
import json
import resource
import sys
from typing import Any

MEMORY = 1 << 30  # bytes of this process


def main() -> None:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks answers in some templates: what is inside, as it is."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def stop(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = stop
    compiled: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        template = asked.pop("template")
        try:
            if template not in compiled:
                compiled[template] = environment.from_string(template)
            answer = {"text": compiled[template].render(**asked)}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY:,} bytes"}
        except Exception as error:  # whatever a stranger's template raises
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(OSError, ValueError):  # of a system that bounds none
            resource.setrlimit(kind, (most, most))
    main()
