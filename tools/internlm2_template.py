"""InternLM2's chat template, with tools: the model's own drops the tools offered, the calls made and their results.

Owns the prompt only. The layout is the one of InternLM's chat format document, with the list of tools on one line.
Without tools the text is exactly that of the model's own template.

* Functions are listed in a system turn of their own, after the first system message, as bare function objects.
  The interpreter is offered by the tool `{"type": "code_interpreter"}`, whose turn comes first.
* `arguments` in the history of calls are mappings, as transformers' templates have them; a string is taken as it is.
* Results are `tool` messages, or `environment` messages with the name "plugin" or "interpreter".
"""

INTERPRETER_PROMPT = """\
You now have access to a Jupyter notebook environment supporting Python code execution. \
Just send code to python to run in this stateful environment. This feature is suitable for:
- Data analysis or processing (such as data manipulation and graphic creation)
- Complex calculations (such as math and physics problems)
- Programming examples (for understanding programming concepts or language features)
- Text processing and analysis (including text analysis and natural language processing)
- Machine learning and data science (model training and data visualization)
- File operations and data import (handling CSV, JSON, etc. formats)"""

CHAT_TEMPLATE = (
    """\
{%- set offer = namespace(functions=[], interpreter=false) -%}
{%- for tool in tools or [] -%}
    {%- if tool.type == 'code_interpreter' -%}
        {%- set offer.interpreter = true -%}
    {%- else -%}
        {%- set offer.functions = offer.functions + [tool.function or tool] -%}
    {%- endif -%}
{%- endfor -%}
{%- set history = namespace(interpreter_call_ids=[]) -%}

{%- macro tool_turns() -%}
    {%- if offer.interpreter -%}
        {{- '<|im_start|>system name=<|interpreter|>\\n' -}}
        {{- '"""
    + INTERPRETER_PROMPT.replace("\n", "\\n")
    + """' -}}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
    {%- if offer.functions -%}
        {{- '<|im_start|>system name=<|plugin|>\\n[' -}}
        {%- for function in offer.functions -%}
            {{- function_object(function) -}}
            {{- ', ' if not loop.last -}}
        {%- endfor -%}
        {{- ']<|im_end|>\\n' -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro function_object(function) -%}
    {{- '{' -}}
    {%- for key, value in function.items() if key not in ('strict', 'type') -%}
        {{- key | tojson + ': ' + value | tojson -}}
        {{- ', ' if not loop.last -}}
    {%- endfor -%}
    {{- '}' -}}
{%- endmacro -%}

{%- macro call(function) -%}
    {%- set arguments = function.arguments or {} -%}
    {%- if function.name == 'code_interpreter' and arguments is mapping and arguments.code is string -%}
        {{- '<|action_start|><|interpreter|>\\n' -}}
        {%- if arguments.language -%}
            {{- '```' + arguments.language + '\\n' + arguments.code + '\\n```' -}}
        {%- else -%}
            {{- arguments.code -}}
        {%- endif -%}
        {{- '<|action_end|>\\n' -}}
    {%- else -%}
        {{- '<|action_start|><|plugin|>\\n{"name": ' + function.name | tojson + ', "parameters": ' -}}
        {{- arguments if arguments is string else arguments | tojson -}}
        {{- '}<|action_end|>' -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro role(message) -%}
    {%- if message.role == 'tool' -%}
        {%- if message.tool_call_id in history.interpreter_call_ids or message.name == 'code_interpreter' -%}
            {{- 'environment name=<|interpreter|>' -}}
        {%- else -%}
            {{- 'environment name=<|plugin|>' -}}
        {%- endif -%}
    {%- elif message.role == 'environment' and message.name in ('plugin', 'interpreter') -%}
        {{- 'environment name=<|' + message.name + '|>' -}}
    {%- elif message.role == 'user' and message.name == 'file' and offer.interpreter -%}
        {{- 'user name=file' -}}
    {%- else -%}
        {{- message.role -}}
    {%- endif -%}
{%- endmacro -%}

{{- bos_token -}}
{%- if not messages or messages[0].role != 'system' -%}
    {{- tool_turns() -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + role(message) + '\\n' -}}
    {{- message.content if message.content is not none and message.content is defined -}}
    {%- for tool_call in message.tool_calls or [] -%}
        {%- set function = tool_call.function or tool_call -%}
        {%- if function.name == 'code_interpreter' and tool_call.id -%}
            {%- set history.interpreter_call_ids = history.interpreter_call_ids + [tool_call.id] -%}
        {%- endif -%}
        {{- call(function) -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
    {%- if loop.first and message.role == 'system' -%}
        {{- tool_turns() -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)
