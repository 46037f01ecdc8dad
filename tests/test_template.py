"""The text that a chat template writes, and what is said where another is trained on."""

import copy
import datetime

import pytest
import transformers.utils.chat_template_utils

import data
from helpers import (
    CHATML,
    DANUBE,
    build_tokenizer,
    data_config,
    encoder,
    many,
    record,
    text,
    user,
    write_jsonl,
)
from support.reward import _encode
from support.template import compare_template

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITHOUT_FLAG = "{% for m in messages %}" + TURN + "{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
THINKS = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>{% endif %}{{ m.content }}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ASK


def warning(template, messages=None, answer="An answer."):
    messages = messages or [user("Hello")]
    return compare_template(encoder(build_tokenizer(template)), messages, answer)


@pytest.mark.parametrize("template", [CHATML, DANUBE, LLAMA2])
@pytest.mark.parametrize("answer", ["An answer.", " Spaces \n around \n"])
def test_a_template_that_writes_what_is_trained_on_needs_no_word(template, answer):
    assert warning(template, answer=answer) is None
    assert warning(template.replace("m.content", "m.content | trim"), answer=answer) is None


def test_a_template_that_ignores_the_generation_prompt_is_named():
    said = warning(WITHOUT_FLAG)
    assert "The template ignores add_generation_prompt." in said
    assert "<|im_start|>assistant" in said
    assert "trained on is 'ANSWER<|im_end|>'" in said


@pytest.mark.parametrize(
    ("template", "shown"), [(THINKS, "<think>ANSWER"), (WITHOUT_END, "trained on is")]
)
def test_a_template_that_writes_more_or_less_around_an_answer_is_said(template, shown):
    said = warning(template)
    assert shown in said
    assert "ignores add_generation_prompt" not in said


def test_the_first_pair_is_compared_too():
    rewrites = CHATML.replace("m.content", "m.content | replace('secret', 'public')")
    assert warning(rewrites) is None
    assert "public" in warning(rewrites, answer="a secret")


@pytest.mark.parametrize("template", [CHATML, WITHOUT_FLAG, None])
def test_a_run_says_so_in_one_loud_line(tmp_path, capsys, template):
    path = write_jsonl(tmp_path / "a.jsonl", many(3))
    data.load_pairs(data_config(path), build_tokenizer(template))
    loud = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!!!")]
    assert len(loud) == (template != CHATML)


def test_a_base_model_is_told_what_text_it_is_trained_on():
    said = warning(None)
    assert "no chat template" in said
    assert "nothing between prompt and answer, such as 'questionANSWER<|im_end|>'" in said


def test_a_base_model_is_told_what_to_do_about_it():
    said = warning(None)
    assert "For a chat give the model that was tuned for it (mostly called ...-Instruct)" in said
    assert "or set the tokenizer's chat_template" in said
    assert "for plain text end each prompt as its answers need it" in said


def test_a_template_that_leaves_out_the_question_is_named():
    said = warning(CHATML.replace("{{ m.content }}", "{% if loop.last %}{% endif %}"))
    assert said.startswith("The chat template leaves out what the user says")


@pytest.fixture
def another_day(monkeypatch):
    """The clock of chat templates, set to 30 March 2031."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, *arguments):
            return cls(2031, 3, 30)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)


# Llama 3.2's form, SmolLM3's, gpt-oss's, Granite's
@pytest.mark.parametrize(
    ("call", "written"),
    [
        ('strftime_now("%d %b %Y")', "01 Jan 2025"),
        ('strftime_now("%d %B %Y")', "01 January 2025"),
        ("strftime_now( '%Y-%m-%d' )", "2025-01-01"),
        ("strftime_now('%B %d, %Y')", "January 01, 2025"),
    ],
)
def test_a_template_that_asks_for_the_date_gets_one_that_does_not_change(
    call, written, another_day
):
    dated = "{% if strftime_now is defined %}On {{ " + call + " }}: {% endif %}"
    tokenizer = copy.deepcopy(build_tokenizer(CHATML))
    tokenizer.chat_template = {"default": dated + CHATML, "tool_use": dated + "tools" + CHATML}
    tool = {"type": "function", "function": {"name": "f", "description": "f"}}
    prompt_ids = encoder(tokenizer).encode(record("Q")).prompt_ids
    assert text(prompt_ids).startswith(f"On {written}: <|im_start|>")
    assert encoder(tokenizer).render([user("Q")], tools=[tool]).startswith(f"On {written}: tools")
    scored = _encode(tokenizer, [user("Q")], "good")["input_ids"]
    assert text(scored).startswith(f"On {written}: <|im_start|>")
    own = tokenizer.apply_chat_template([user("Q")], tokenize=False)
    assert "2031" in own


def test_a_run_tells_the_date_that_its_prompts_have(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", many(3))
    dated = "{{ strftime_now('%Y') }}" + CHATML
    for template, told in ((dated, True), (CHATML, False), (None, False)):
        data.load_pairs(data_config(path), build_tokenizer(template))
        assert ("writes the date: 01 Jan 2025" in capsys.readouterr().out) == told
