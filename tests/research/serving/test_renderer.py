"""Templates by strangers: what is late is killed, what is large is refused, and nothing of Python is within reach."""

import time

import pytest

jinja2 = pytest.importorskip("jinja2")

from research.serving import sandbox
from research.serving.refusal import Refusal
from research.serving.renderer import Renderer

TOLD = {"messages": [{"role": "user", "content": "hello"}]}


def rendered(source: str, seconds: float = 5.0, told=TOLD) -> str:
    renderer = Renderer(source, seconds)
    try:
        return renderer.render(told)
    finally:
        renderer.close()


def test_a_template_is_rendered_again_and_again():
    renderer = Renderer("{{ messages[0].content }}{{ messages | length }}", 5.0)
    assert [renderer.render(TOLD) for _ in range(3)] == ["hello1"] * 3
    process = renderer._process
    renderer.close()
    assert process is not None and not process.is_alive()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{% set ns = namespace(a=1) %}{{ ns.__init__.__globals__ }}",
        "{{ messages.append({'role': 'system'}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include 'etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ '%s' | format(messages.__class__.__mro__) }}{{ ('{0.__class__.__mro__}').format(messages) }}",
        "{{ open('/etc/passwd') }}",
        "{% if %}",
        "{{ messages[5].content.nothing }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_reaches_out_is_refused(source):
    with pytest.raises((jinja2.TemplateError, TypeError, ZeroDivisionError)):
        sandbox.render(sandbox.environment().from_string(source), TOLD)


def test_what_fails_is_a_refusal():
    with pytest.raises(Refusal) as refused:
        rendered("{{ ''.__class__.__mro__ }}")
    assert refused.value.param == "messages" and "unsafe" in refused.value.message and len(refused.value.message) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ (messages | length + 8) ** (9 ** 9) }}",
        "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    ],
    ids=["endless", "large", "wide", "wider", "huge", "long", "deep", "grown"],
)
def test_what_takes_too_much_is_refused(source):
    """Each within its second, or for want of memory. The next conversation finds a fresh process."""
    begun = time.monotonic()
    with pytest.raises(Refusal):
        rendered("{% if messages %}" + source + "{% endif %}", seconds=1.0)
    assert time.monotonic() - begun < 60


def test_after_one_that_was_late_the_next_is_rendered():
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = Renderer(f"{{% if messages | length > 1 %}}{loops}{{% endif %}}ok", 0.5)
    with pytest.raises(Refusal, match="took more than 0.5 s"):
        renderer.render({"messages": TOLD["messages"] * 2})
    assert renderer.render(TOLD) == "ok"
    renderer.close()
