"""Chat templates: the text transformers renders, and nothing a hostile template asks for."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.core.errors import InputError
from exporter.runtime.chat import ChatTemplate, RenderLimits, read_special_tokens

# Half the CPU second that hostile templates burn is spent on starting up.
SHORT = RenderLimits(cpu_seconds=1, memory_bytes=1 << 28, output_chars=10_000)
USER = [{"role": "user", "content": "Hi"}]
CONVERSATION = [
    {"role": "system", "content": "Be brief. <&> \"q\" 'q' ünïcode 你"},
    {"role": "user", "content": "  Hello  \n"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]

# In the manner of Llama 3.1: dates, tools left out, headers, trimmed contents, default values.
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# In the manner of Llama 2: alternation is enforced, the system text is folded into the first turn.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

# Blocks, indentation, loop controls, JSON, namespaces, macros, generation marks.
FEATURES = """{% macro show(m) %}[{{ m.role }}]{% endmacro %}
{% set ns = namespace(count=0) %}
    {% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
        {% set ns.count = ns.count + 1 %}
{{ show(m) }} {{ m | tojson }} {{ {'b': 1, 'a': '<é>'} | tojson(indent=2) }}
{% generation %}{{ m.content }}{% endgeneration %}

    {% if ns.count > 1 %}{% break %}{% endif %}
    {% endfor %}
{{ ns.count }} {{ dict(a=1).a }} {{ undefined_thing }} {{ messages | length }} {{ range(3) | list }}
"""


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("gqa")


def own(directory: Path, source: str, **fields: Any) -> ChatTemplate:
    return dataclasses.replace(ChatTemplate(source, read_special_tokens(directory)), **fields)


@pytest.mark.parametrize("source", [LLAMA3, LLAMA2, FEATURES], ids=["llama3", "llama2", "features"])
@pytest.mark.parametrize("messages", [USER, CONVERSATION], ids=["one", "several"])
@pytest.mark.parametrize("prompt", [True, False])
def test_text_is_that_of_transformers(directory: Path, source: str, messages: list[Any], prompt: bool) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
    assert own(directory, source).render(messages, add_generation_prompt=prompt) == expected


def test_the_template_of_a_directory(directory: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate.from_directory(directory)
    assert ours.render(CONVERSATION) == theirs.apply_chat_template(CONVERSATION, tokenize=False)


def test_special_tokens_in_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>", "special": true}, "x": 1}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": null}')
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_model_without_template(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(InputError) as caught:
        ChatTemplate.from_directory(copy)
    assert caught.value.kind == "chat.missing"


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as caught:
        ChatTemplate.from_directory(tmp_path)
    assert caught.value.kind == "chat.template"


def refused(source: str, messages: list[Any] = USER, limits: RenderLimits = SHORT) -> str:
    with pytest.raises(InputError) as caught:
        ChatTemplate(source, {}, limits).render(messages)
    assert caught.value.kind == "chat.template" and caught.value.exit_code == 2 and caught.value.remedy
    return caught.value.message


def test_a_template_may_refuse_the_conversation_in_its_own_words() -> None:
    backwards = [{"role": "assistant", "content": "Hi"}]
    assert "must alternate" in refused(LLAMA2, backwards)


LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "deep digits": "{{ (7 ** (10 ** 9)) % 7 }}",
    "regular expression": "{{ ('a' * 40 ~ 'b') | replace('a', 'a' * 100000) | wordwrap(1) }}",
}
MEMORY = {
    "multiplied text": "{{ 'x' * 10 ** 10 }}",
    "multiplied list": "{% set x = [0] * 10 ** 10 %}",
    "doubling": "{% set ns = namespace(s='xxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "padding": "{{ '%999999999d' | format(1) }}",
    "centred": "{{ 'x' | center(10 ** 10) }}",
    "long output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}
RECURSION = {
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "nested template": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nested filters": "{{ 1" + "|string" * 50_000 + " }}",
}
ESCAPES = {
    "bases": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "indirect format": "{{ ''.format.__globals__ }}",
    "map filter": "{{ ['']|map(attribute='__class__')|list }}{{ ('')|map('attr', '__class__')|list|first|first }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "namespace insides": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "self": "{{ self.__init__.__globals__ }}",
    "type walk": "{{ dict.mro() }}",
    "joiner": "{{ joiner().__init__.__builtins__ }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_templates_that_loop_are_ended(source: str) -> None:
    refused(source)


@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY)
def test_templates_that_want_memory_are_ended(source: str) -> None:
    refused(source)


@pytest.mark.parametrize("source", RECURSION.values(), ids=RECURSION)
def test_templates_that_recurse_are_ended(source: str) -> None:
    refused(source)


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_templates_that_reach_outside_are_refused(source: str) -> None:
    refused(source)


def test_a_template_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    names = "{{ messages | length }}{{ SECRET }}{{ os }}{{ environ }}"
    assert ChatTemplate(names).render(USER) == "1"


def test_an_overlong_template() -> None:
    assert "longer" in refused("x" * (1 << 20) + "x")


def test_a_process_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr("exporter.runtime.chat.WORKER", worker)
    assert "0.3 seconds" in refused("x", limits=dataclasses.replace(SHORT, wall_seconds=0.3))


def test_the_worker_cannot_open_files_or_start_processes(tmp_path: Path) -> None:
    """Even code that left the sandbox could not: checked on the limits themselves."""
    import subprocess
    import sys

    from exporter.runtime.chat import WORKER

    attempts = "open('/etc/hostname')", "__import__('socket').socket()", "os.pipe()"
    script = f"""
import os, socket, sys
sys.path.insert(0, {str(WORKER.parent)!r})
import chat_worker
chat_worker.limit(5, 1 << 29)
for attempt in {attempts!r}:
    try:
        eval(attempt)
    except OSError:
        continue
    raise SystemExit("allowed: " + attempt)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "messages",
    [[], ["text"], [{"content": "no role"}], [{"role": "user"}], [{"role": 1, "content": "x"}],
     [{"role": "user", "content": object()}]],
)  # fmt: skip
def test_what_is_not_a_conversation(messages: list[Any]) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate("x").render(messages)
    assert caught.value.kind == "chat.messages"
