"""Whether a model is trained on the text that its chat template writes."""

import os

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
        trained = encoder.render(prompt, add_generation_prompt=True) + reply + end
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


def left_out_of(rendered, preference):
    """What of a prompt a chat template has silently left out, in words, or None.

    Templates know users and assistants, but may skip other roles, tools and tool calls. A turn of
    an assistant is not asked for, since some templates strip the reasoning of earlier ones.
    """
    for turn in preference.messages:
        if turn["role"] not in ("user", "assistant") and turn["content"].strip() not in rendered:
            return f"the turns of role {turn['role']}"
        for call in turn.get("tool_calls", ()):
            if call["function"]["name"] not in rendered:
                return "tool calls"
    for tool in preference.tools or ():
        if tool["function"]["name"] not in rendered:
            return "the tools"
    return None


def _squeeze(text):
    """Text without spaces and newlines, which a template may set or strip around an answer."""
    return "".join(text.split())
