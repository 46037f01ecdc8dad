"""A reward for `reward: tests/pairs/reward.py:passes`, and an example for one of your own.

It is called for each sampled answer, with the prompt's messages, the answer's text and the record
that the prompt came from. True and False make a verifier: a passing answer is trained on against a
failing one, and an answer that did not end fails. Numbers make best against worst.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import make_pairs


def passes(messages, answer, record):
    """Whether the answer fulfils the instruction that the record's column "check" names."""
    return make_pairs.passes(record["check"], answer)
