"""Chat templates by name, in Jinja as transformers renders it (`trim_blocks` and `lstrip_blocks` on).

The names are those that mergekit's `chat_template:` knows. `commonest` is the rule behind the word `auto`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from surgery.checkpoint.reader import read_json

_ALPACA = """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] | trim }}
{%- elif message['role'] == 'assistant' %}
### Response:
{{ message['content'] | trim }}
{%- else %}
### {{ 'Input' if message['role'] == 'user_context' else 'Instruction' }}:
{{ message['content'] | trim }}
{%- endif %}
{{- '' if loop.last and not add_generation_prompt else '\\n\\n' }}
{%- endfor %}
{{- '### Response:\\n' if add_generation_prompt }}"""

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}"""

_EXAONE = """\
{% if messages[0]['role'] != 'system' %}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif %}
{% for message in messages %}
{{ '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{{- '[|assistant|]' if add_generation_prompt }}"""

_LLAMA3 = """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"""

_MISTRAL = """\
{{ bos_token }}
{%- set turns = namespace(system='', expected='user') %}
{%- for message in messages %}
{%- if loop.first and message['role'] == 'system' %}
{%- set turns.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] != turns.expected %}
{{- raise_exception('After the system message, user and assistant take turns, the user first.') }}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + turns.system + message['content'] + ' [/INST]' }}
{%- set turns.system = '' %}
{%- set turns.expected = 'assistant' %}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- set turns.expected = 'user' %}
{%- endif %}
{%- endfor %}"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""Jinja text by name."""


def template_of(folder: Path) -> str | None:
    """The default chat template of the tokenizer in `folder`, None without one.

    It is looked for where transformers looks: `chat_template.jinja`, then inside two JSON files.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several, each with its name
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def commonest(folders: Iterable[Path]) -> str | None:
    """The chat template that most of `folders` have, the first one's among equals; None when none has any."""
    found = [template.strip() for folder in folders if (template := template_of(folder))]
    return Counter(found).most_common(1)[0][0] if found else None
