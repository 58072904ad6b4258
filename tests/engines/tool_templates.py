"""Short chat templates of our own, one for each form of tool calls, that make the same demands as the families' do."""

from __future__ import annotations

from tta_middleware.types import ToolFormat

_SHOWN = """\
{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor -%}
{{ '__' }}{{ '<|im_end|>\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- if m.tool_calls %}__{% endif %}{{ '<|im_end|>\n' }}{% endfor -%}
{{ '<|im_start|>assistant\n' }}"""


def _in_turns(taught: str, calls: str) -> str:
    """A template in ChatML that says ``taught`` with its tools and renders an answer's calls by ``calls``."""
    first, second, third = _SHOWN.split("__")
    return f"{first}{taught}{second}{calls}{third}"


_VALUE = "{{ v if v is string else v | tojson }}"
_EACH = "{% for c in m.tool_calls %}"
_ITEMS = "{% for k, v in c.function.arguments | items %}"
_ENDED = "{% endfor %}"
_JSON = "{{ c.function.arguments | tojson }}"
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


TEMPLATES: dict[ToolFormat, str] = {
    "hermes": """\
{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor -%}
{{ 'Call as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor -%}
{{ '<|im_start|>assistant\n' }}""",
    "mistral": """\
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == 0 %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{% endfor %}{{ ']' }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}""",
    "llama": """\
{%- if tools is defined and tools %}
{{- '<|start_header_id|>system<|end_header_id|>Answer as {"name": ..., "parameters": ...}\n' }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('Only single tool-calls at once!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}{% endif %}{% endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>' }}""",
    "mistral_v11": """\
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == 0 %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{%- for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}
{%- endfor %}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}""",
    "qwen3_coder": _in_turns(
        "Call as <tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>",
        f"{_EACH}{{{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}}}{_ITEMS}"
        f"{{{{ '<parameter=' + k + '>\n' }}}}{_VALUE}{{{{ '\n</parameter>\n' }}}}{_ENDED}"
        f"{{{{ '</function>\n</tool_call>' }}}}{_ENDED}",
    ),
    "seed_oss": _in_turns(
        "Call as <seed:tool_call>\\n<function=name>\\n<parameter=key>value</parameter>\\n</function>",
        f"{_EACH}{{{{ '\n<seed:tool_call>\n<function=' + c.function.name + '>\n' }}}}{_ITEMS}"
        f"{{{{ '<parameter=' + k + '>' }}}}{_VALUE}{{{{ '</parameter>\n' }}}}{_ENDED}"
        f"{{{{ '</function>\n</seed:tool_call>' }}}}{_ENDED}",
    ),
    "glm45": _in_turns(
        "Call as <tool_call>name\\n<arg_key>key</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>",
        f"{_EACH}{{{{ '\n<tool_call>' + c.function.name + '\n' }}}}{_ITEMS}"
        f"{{{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}}}{_VALUE}{{{{ '</arg_value>\n' }}}}{_ENDED}"
        f"{{{{ '</tool_call>' }}}}{_ENDED}",
    ),
    "minimax_m2": _in_turns(
        'Call as <minimax:tool_call>\\n<invoke name="name">\\n<parameter name="key">value</parameter>\\n</invoke>',
        f"{{{{ '\n<minimax:tool_call>\n' }}}}{_EACH}"
        f"""{{{{ '<invoke name="' + c.function.name + '">\n' }}}}{_ITEMS}"""
        f"""{{{{ '<parameter name="' + k + '">' }}}}{_VALUE}{{{{ '</parameter>\n' }}}}{_ENDED}"""
        f"{{{{ '</invoke>\n' }}}}{_ENDED}{{{{ '</minimax:tool_call>' }}}}",
    ),
    "deepseek_v3": _in_turns(
        f"Call as {_DEEPSEEK[0]}{_DEEPSEEK[1]}function{_DEEPSEEK[2]}name\\n```json\\n...",
        f"{_DEEPSEEK[0]}{_EACH}{_DEEPSEEK[1]}{{{{ c.type + '{_DEEPSEEK[2]}' + c.function.name + '\n```json\n' }}}}"
        f"{_JSON}{{{{ '\n```{_DEEPSEEK[3]}' }}}}{_ENDED}{_DEEPSEEK[4]}",
    ),
    "deepseek_v31": _in_turns(
        f"Call as {_DEEPSEEK[0]}{_DEEPSEEK[1]}name{_DEEPSEEK[2]}...",
        f"{_DEEPSEEK[0]}{_EACH}{_DEEPSEEK[1]}{{{{ c.function.name }}}}{_DEEPSEEK[2]}{_JSON}{_DEEPSEEK[3]}{_ENDED}"
        f"{_DEEPSEEK[4]}",
    ),
    "kimi_k2": _in_turns(
        "",
        f"<|tool_calls_section_begin|>{_EACH}<|tool_call_begin|>"
        "{{ 'functions.' + c.function.name + ':' + loop.index0 | string }}<|tool_call_argument_begin|>"
        f"{_JSON}<|tool_call_end|>{_ENDED}<|tool_calls_section_end|>",
    ),
    "gemma4": _in_turns(
        "",
        f"{_EACH}{{{{ '<|tool_call>call:' + c.function.name + '{{' }}}}{_ITEMS}"
        """{{ k + ':<|"|>' + v + '<|"|>' }}{% if not loop.last %},{% endif %}"""
        f"{_ENDED}{{{{ '}}<tool_call|>' }}}}{_ENDED}",
    ),
    "harmony": """\
{#- max 1 tool call per message #}
{%- if tools %}{{ '<|start|>developer<|message|>' }}
{%- for t in tools %}{{ 'functions.' + t.function.name + ': ' + t.function.description }}{% endfor %}{{ '<|end|>' }}
{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}
{%- set c = m.tool_calls[0].function %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' }}
{{- (c.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""",
    "apriel": _in_turns(
        'Call as <tool_calls>[{"name": ..., "arguments": ...}]</tool_calls>',
        """<tool_calls>[{% for c in m.tool_calls %}{{ '{"name": "' + c.function.name + '", "arguments": ' }}"""
        """{{ c.function.arguments | tojson }}{{ '}' }}{% if not loop.last %}, {% endif %}{% endfor %}]</tool_calls>""",
    ),
}
