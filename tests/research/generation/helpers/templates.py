"""Chat templates as models have them: the same shapes, written down for tests."""

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- set ns = namespace(date=strftime_now('%d %b %Y')) %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Today Date: ' + ns.date + '\n\n' }}
{{- system }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
ODDS_AND_ENDS = """{% macro turn(m) %}{{ m.role }}|{{ m.content | tojson }}{% endmacro %}
{% for message in messages %}{% if message.content == 'skip' %}{% continue %}{% endif %}
{% generation %}{{ turn(message) }}{% endgeneration %}
{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}{{ dict(a=1) | tojson(indent=2) }}{{ messages | length }}{{ tools is none }}{{ nothing }}{{ eos_token }}"""
ALL = {"chatml": CHATML, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "odds and ends": ODDS_AND_ENDS}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
