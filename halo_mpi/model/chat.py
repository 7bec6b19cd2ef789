"""Chat templates: the Jinja programs that models carry to lay out a conversation."""

import json
from datetime import datetime

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halo_mpi.errors import InputError


def render_chat(template: str, user: str, bos: str | None, eos: str | None) -> str:
    """The text of a conversation of one user message, with the beginning of the answer.

    Templates are run as transformers runs them, in a sandbox.

    Raises InputError if the template fails.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template).render(
            messages=[{"role": "user", "content": user}],
            tools=None,
            documents=None,
            bos_token=bos or "",
            eos_token=eos or "",
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program and may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model's chat template fails ({reason}); leave out --chat") from error


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, indent: int | None = None, **options) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
