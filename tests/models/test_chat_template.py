"""Chat templates that are honest pass the trial; those that have no end or reach out do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lopt.models import chat_template
from lopt.models.chat_template import _problem, check_chat_template
from lopt.models.pickles import UntrustedError

HONEST = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% set n = namespace(a=1) %}{% set n.a = 2 %}",
    "{{ raise_exception('System role not supported') }}",
    "{{ missing.key.of.nothing }}{% if x %}",
)
HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "come to an end",
    "{{ 'a' * 10**10 }}": "of memory",
    "{{ 'a' * 10**7 }}": "makes 10,000,000 characters",
    "{{ ''.__class__.__mro__ }}": "is stopped by the sandbox (access to attribute '__class__'",
    "{% include '/etc/passwd' %}": "is stopped by the sandbox (it includes another file)",
}


@pytest.mark.parametrize("template", HONEST)
def test_honest(template: str) -> None:
    assert _problem(template, '{"eos_token": "<eos>"}') is None


def test_a_process_that_ends_writes_nothing_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(chat_template, "__file__", str(tmp_path / "chat_template.py"))
    script = tmp_path / "chat_template_process.py"
    script.write_text("def answer(question):\n    raise ValueError('a traceback')\n")
    assert _problem("{{ 'ends' }}", "{}") == "fails in a way that no template should"
    script.write_text("raise ImportError('a traceback')\n")
    tokenizer = SimpleNamespace(chat_template="{{ 'does not start' }}", special_tokens_map={})
    with pytest.raises(
        UntrustedError, match=r"of m cannot be checked \(.* did not start within 120 s\) for a"
    ):
        check_chat_template("m", tokenizer)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    assert HOSTILE[template] in str(_problem(template, "{}"))
