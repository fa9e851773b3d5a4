"""Llama 3.1's chat template with tools, for models of the format whose own template drops the tools.

Owns the prompt only. The layout is the one of Llama 3.1's own template: the functions stand in the first user message,
calls are JSON objects, results have the role `ipython`. Unlike there, several calls in one turn are rendered, separated
by semicolons, and results are passed on as they are instead of as a JSON string.
"""

CHAT_TEMPLATE = """\
{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages -%}
{%- set system = messages[0].content | trim if messages and messages[0].role == 'system' else '' -%}
{%- set offer = namespace(pending=tools) -%}

{%- macro header(role) -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{%- endmacro -%}

{%- macro functions() -%}
    {{- 'Given the following functions, please respond with a JSON for a function call ' -}}
    {{- 'with its proper arguments that best answers the given prompt.\\n\\n' -}}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
    {{- 'Do not use variables.\\n\\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson(indent=4) + '\\n\\n' -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro calls(message) -%}
    {%- for tool_call in message.tool_calls -%}
        {%- set function = tool_call.function or tool_call -%}
        {%- if function.name == 'code_interpreter' and function.arguments.code is string -%}
            {{- '<|python_tag|>' + function.arguments.code -}}
        {%- else -%}
            {{- '{"name": ' + function.name | tojson + ', "parameters": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}' + ('; ' if not loop.last else '') -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}

{{- bos_token + header('system') -}}
{{- 'Environment: ipython\\n' if tools or builtin_tools -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' -}}
{%- for message in turns -%}
    {%- if message.role == 'tool' -%}
        {{- header('ipython') + message.content + '<|eot_id|>' -}}
    {%- elif message.tool_calls -%}
        {{- header('assistant') + calls(message) + ('<|eom_id|>' if builtin_tools else '<|eot_id|>') -}}
    {%- else -%}
        {{- header(message.role) -}}
        {%- if offer.pending and message.role == 'user' -%}
            {%- set offer.pending = none -%}
            {{- functions() -}}
        {%- endif -%}
        {{- message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{{- header('assistant') if add_generation_prompt -}}
"""
