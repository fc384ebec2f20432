"""The conversation templates that original InternVL checkpoints name, as Jinja chat templates.

Facts from `internvl_chat/internvl/conversation.py` of github.com/OpenGVLab/InternVL: all of the templates
here have the separator style MPT, which puts the system message first, always, and ends every message with
the same separator. Knows nothing about tokenizers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported

__all__ = ["IMAGE_TOKEN", "VIDEO_TOKEN", "Conversation", "chat_template", "find_conversation"]

IMAGE_TOKEN = "<IMG_CONTEXT>"
VIDEO_TOKEN = "<video>"  # the processor replaces it; the model never sees it

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "  # noqa: RUF001
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Conversation:
    """How a conversation becomes one string: every message is its role's opening, its text, ``end``."""

    system_message: str
    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>"

    @property
    def stop_token(self) -> str:
        """The token that ends the model's answer."""
        return self.end.strip()


_CONVERSATIONS = {
    "Hermes-2": Conversation(_SYSTEM_2),
    "internlm2-chat": Conversation(_SYSTEM_2),
    "phi3-chat": Conversation(_SYSTEM_2, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
    "internvl2_5": Conversation(_SYSTEM_2_5, end="<|im_end|>\n"),
}


def find_conversation(config: dict[str, Any]) -> Conversation:
    """The conversation template that an original config.json names in ``template``.

    Its ``system_message``, where it has one, replaces the template's.

    Raises:
        ThinsightError: the template is not known.
    """
    name = config.get("template")
    if name not in _CONVERSATIONS:
        raise Unsupported(f"template is {name!r} in config.json; supported: {', '.join(_CONVERSATIONS)}")
    conversation = _CONVERSATIONS[name]
    own = config.get("system_message")
    if isinstance(own, str):
        return Conversation(
            own, conversation.system, conversation.user, conversation.assistant, conversation.end
        )
    return conversation


def chat_template(conversation: Conversation) -> str:
    """A Jinja chat template that renders what the original code renders.

    Message contents are strings, or lists of ``{"type": "text" | "image" | "video", ...}`` in which an image
    is its token and a line break, as the original puts it before a question. A system message that is given
    replaces the default one.
    """
    system, user, assistant, end = (
        _literal(part)
        for part in (conversation.system, conversation.user, conversation.assistant, conversation.end)
    )
    return "".join(
        (
            "{%- macro render(content) -%}",
            "{%- if content is string -%}{{- content -}}{%- else -%}{%- for item in content -%}",
            "{%- if item['type'] == 'image' -%}{{- " + _literal(IMAGE_TOKEN + "\n") + " -}}",
            "{%- elif item['type'] == 'video' -%}{{- " + _literal(VIDEO_TOKEN + "\n") + " -}}",
            "{%- else -%}{{- item['text'] -}}{%- endif -%}",
            "{%- endfor -%}{%- endif -%}",
            "{%- endmacro -%}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set system, turns = render(messages[0]['content']), messages[1:] -%}",
            "{%- else -%}",
            "{%- set system, turns = " + _literal(conversation.system_message) + ", messages -%}",
            "{%- endif -%}",
            "{{- " + system + " + system + " + end + " -}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' -%}{{- " + user + " -}}",
            "{%- elif message['role'] == 'assistant' -%}{{- " + assistant + " -}}",
            "{%- else -%}{{- raise_exception('a conversation has the roles user and assistant, ",
            "after at most one system message') -}}{%- endif -%}",
            "{{- render(message['content']) + " + end + " -}}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + assistant + " -}}{%- endif -%}",
        )
    )


def _literal(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
