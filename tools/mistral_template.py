"""Mistral's chat template with tools, for models of the format whose own template drops the tools.

Owns the prompt only. The layout is the one of Mistral Nemo: tools right before the last user message, which the system
message is a part of, results as JSON objects. Unlike in Nemo's own template the system message stays when the last
message is a result, and results that are not JSON are quoted.
"""

CHAT_TEMPLATE = """\
{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set last.user = loop.index0 -%}
{%- endfor -%}
{%- set seen = namespace(users=0) -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {%- if seen.users == last.user -%}
            {%- if tools -%}
                {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
            {%- endif -%}
            {{- '[INST]' + (system + '\\n\\n' if system else '') + message.content + '[/INST]' -}}
        {%- else -%}
            {{- '[INST]' + message.content + '[/INST]' -}}
        {%- endif -%}
        {%- set seen.users = seen.users + 1 -%}
    {%- elif message.role == 'assistant' -%}
        {{- message.content or '' -}}
        {%- if message.tool_calls -%}
            {{- '[TOOL_CALLS][' -}}
            {%- for tool_call in message.tool_calls -%}
                {%- set function = tool_call.function or tool_call -%}
                {{- '{"name": ' + function.name | tojson + ', "arguments": ' -}}
                {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
                {{- ', "id": ' + tool_call.id | tojson if tool_call.id -}}
                {{- '}' + (', ' if not loop.last else '') -}}
            {%- endfor -%}
            {{- ']' -}}
        {%- endif -%}
        {{- eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS]{"content": ' + message.content | tojson -}}
        {{- ', "call_id": ' + message.tool_call_id | tojson if message.tool_call_id -}}
        {{- '}[/TOOL_RESULTS]' -}}
    {%- else -%}
        {{- raise_exception('Mistral takes one system message, first, and not the role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
"""
