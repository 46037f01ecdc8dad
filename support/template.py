"""What text a chat template writes, and whether a model is trained on it."""

import os
import re
from datetime import date

from jinja2 import TemplateError

from support.errors import InputError, first_line

# today, wherever a template asks for it: else a run could not go on, or be repeated, tomorrow
DAY = date(2025, 1, 1)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""")
QUESTION = [{"role": "user", "content": "question"}]
ANSWER = "ANSWER"


def compare_template(encoder, messages, answer):
    """What a model is trained on, where its chat template writes a conversation otherwise.

    Trained on is what generation sees and is to go on with: the prompt with add_generation_prompt,
    the answer, the end of turn. Compared with the template's text of the whole conversation, for a
    plain question and answer and for those given.

    encoder   a data.PairEncoder
    messages  of a prompt
    answer    to it
    returns   a sentence, or None where both are the same but for spaces and newlines
    """
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn)
    if not encoder.tokenizer.chat_template:
        text = encoder.render(QUESTION) + ANSWER + end
        return (
            "The model has no chat template, as a base model has none: it is trained on plain text "
            f"with nothing between prompt and answer, such as {text!r}. For a chat give the model "
            "that was tuned for it (mostly called ...-Instruct), or set the tokenizer's "
            "chat_template; for plain text end each prompt as its answers need it, with a newline "
            "or a space"
        )
    if QUESTION[0]["content"] not in encoder.render(QUESTION, add_generation_prompt=True):
        return (
            "The chat template leaves out what the user says: the model is trained on answers "
            "without their questions. Mend the tokenizer's chat_template"
        )
    conversations = ((QUESTION, ANSWER), (messages, answer))
    for prompt, reply in conversations:
        rendered = encoder.render(prompt, add_generation_prompt=True)
        trained = rendered + after_opened_thought(rendered, reply) + end
        whole = encoder.render([*prompt, {"role": "assistant", "content": reply}])
        if _squeeze(whole).startswith(_squeeze(trained)):
            continue
        same = len(os.path.commonprefix([trained, whole]))
        before = trained[max(0, same - 30) : same]
        ignored = ""
        if encoder.render(prompt) == encoder.render(prompt, add_generation_prompt=True):
            ignored = "The template ignores add_generation_prompt. "
        return (
            "The model is trained to go on from generation's prompt, but the chat template writes "
            f"another text in a conversation: after {before!r} {whole[same : same + 40]!r}, where "
            f"trained on is {trained[same : same + 40]!r}. {ignored}Mend the tokenizer's "
            "chat_template if that is not meant"
        )
    return None


def render_around_an_answer(encoder):
    """What a chat template writes around an answer to a question.

    encoder  a data.PairEncoder
    returns  the question with the generation prompt, that prompt alone, white space between it and
             an answer, and what follows the answer
    raises   InputError if the template fails
    """
    answer = {"role": "assistant", "content": ANSWER}
    try:
        asked = encoder.render(QUESTION, add_generation_prompt=True)
        answered = encoder.render([*QUESTION, answer])
    except TemplateError as error:
        raise InputError(f"the chat template fails: {first_line(error)}") from error
    gap = ""
    if encoder.tokenizer.chat_template and answered.startswith(asked):
        gap, _, _ = answered[len(asked) :].partition(ANSWER)
    if not gap.isspace():  # another text, which compare_template tells of
        gap = ""
    prompt = asked.rpartition(QUESTION[0]["content"])[2]
    return asked, prompt, gap, answered.rpartition(ANSWER)[2]


def after_opened_thought(rendered, answer):
    """An answer without the <think> that its prompt, as rendered, ends with already."""
    opened = re.search(r"<think>(\s*)$", rendered)
    if not opened or not answer.lstrip().startswith("<think>"):
        return answer
    return answer.lstrip().removeprefix("<think>").removeprefix(opened[1])


def dated_template(tokenizer, tools=None):
    """A tokenizer's chat template, with DAY where it would write the day on which it is used."""
    template = tokenizer.get_chat_template(tools=tools)
    return CLOCK.sub(lambda call: repr(DAY.strftime(call["format"])), template)


def tell_day(tokenizer):
    """What day the prompts have, in words; None where the chat template writes none."""
    if not tokenizer.chat_template or not CLOCK.search(tokenizer.get_chat_template()):
        return None
    return (
        f"the chat template writes the date: {DAY:%d %b %Y} in all prompts, so that a run can be "
        "resumed and repeated on another day; the saved model keeps the template as it is"
    )


def left_out_of(render, preference, rendered):
    """What of a prompt a chat template silently leaves out, in words, or None.

    Templates know users and assistants, but may skip other roles, tools and tool calls: what can
    be changed without a change in the text is left out.

    render      messages and tools to text
    preference  support.shapes.Preference
    rendered    the text of its messages and tools
    """
    messages, tools = preference.messages, preference.tools
    for place, turn in enumerate(messages):
        changes = {}
        if turn["role"] not in ("user", "assistant"):
            changes[f"the turns of role {turn['role']}"] = {"content": turn["content"] + "?"}
        if "tool_calls" in turn:
            changes["tool calls"] = {"tool_calls": _renamed(turn["tool_calls"])}
            if turn["content"]:
                changes["the text beside tool calls"] = {"content": turn["content"] + "?"}
        for what, change in changes.items():
            changed = [*messages[:place], turn | change, *messages[place + 1 :]]
            if render(changed, tools) == rendered:
                return what
    if tools and render(messages, _renamed(tools)) == rendered:
        return "the tools"
    return None


def _renamed(functions):
    """Tools or tool calls with other names."""
    renamed = []
    for item in functions:
        function = item["function"]
        renamed.append(item | {"function": function | {"name": function["name"] + "_"}})
    return renamed


def _squeeze(text):
    """Text without spaces and newlines, which a template may set or strip around an answer."""
    return "".join(text.split())
