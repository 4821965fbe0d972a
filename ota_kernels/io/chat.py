"""Chat templates: those of the inputs, and five known ones, written from the formats that models publish."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .tokenizer import files_in, read_bytes, read_json

AUTO = "auto"
_FILE, _CONFIG, _PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"

TEMPLATES = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% if messages and messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set said = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set said.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + said.system + message['content'] + ' [/INST]' }}{% set said.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}


def template_of(folder: Path) -> str:
    """A model's chat template, stripped; its default one where it has several; empty without."""
    for path in files_in(folder, [_FILE]).values():
        return read_bytes(path).decode("utf-8", "replace").strip()
    for name in (_CONFIG, _PROCESSOR):
        for path in files_in(folder, [name]).values():
            if found := _default(read_json(path).get("chat_template")):
                return found
    return ""


def _default(given: Any) -> str:
    if isinstance(given, list):
        given = {each.get("name"): each.get("template") for each in given if isinstance(each, Mapping)}
    if isinstance(given, Mapping):
        given = given.get("default")
    return given.strip() if isinstance(given, str) else ""


def chosen_template(asked: str, folders: Iterable[Path]) -> str:
    """The text that a recipe's `chat_template` asks for; empty where `auto` finds none. folders: of the
    models, in recipe order, which decides where two are equally common."""
    if asked != AUTO:
        return TEMPLATES.get(asked, asked)
    found = Counter(text for text in map(template_of, folders) if text)
    return found.most_common(1)[0][0] if found else ""


def with_template(files: Mapping[str, bytes | Path], template: str) -> dict[str, bytes | Path]:
    """A tokenizer's files with this chat template in place of its own."""
    found = dict(files)
    config = json.loads(_bytes(found[_CONFIG])) if _CONFIG in found else {}
    found[_CONFIG] = (
        json.dumps(config | {"chat_template": template}, indent=2, ensure_ascii=False) + "\n"
    ).encode()
    if _FILE in found:
        found[_FILE] = template.encode()
    if _PROCESSOR in found:
        found[_PROCESSOR] = (json.dumps({"chat_template": template}, indent=2) + "\n").encode()
    return found


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else read_bytes(content)
