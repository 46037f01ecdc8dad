"""Tensors that are computed once and shared by runs, such as the reference's log-probabilities."""

import hashlib
import json
from pathlib import Path

from filelock import FileLock

from support.files import digest_pairs, read_tensors, write_tensors
from support.four_bit import packer
from support.machine import numerics
from support.processes import any_of, say

ROOT = Path(__file__).parent.parent
# what computes a log-probability: after a change its last digits may be others
CODE = [ROOT / "train_dpo.py", ROOT / "dpo_loss.py", ROOT / "data.py"]
for room in ("attention", "four_bit", "model"):
    CODE.append(ROOT / "support" / f"{room}.py")


def read_or_compute(title, folder, depends_on, compute, device):
    """compute(), or what it returned when all that it depends on was the same.

    Several processes compute it together where one of them does not find it.

    title       what to call the result, where it is read
    folder      where results are kept, in a file named by a digest of depends_on, which
                the first process writes; None keeps none
    depends_on  whatever JSON can hold
    compute     function without arguments that returns a dict of tensors
    device      where tensors of the processes meet
    """
    if not folder:
        return compute()
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
    path = Path(folder) / f"{name}.safetensors"
    found, _ = read_tensors(path)
    if not any_of(found is None, device):
        say(f"{title}: read from {path}")
        return found
    found = compute()
    with FileLock(f"{path}.lock"):  # another run may be at the same
        write_tensors(path, found)
    return found


def logps_key(config, setup, splits):
    """Whatever changes a log-probability's last digit: read_or_compute's key.

    setup   the run's Setup: its origin, policy, pairs and rows
    splits  those that are computed
    """
    pairs = {}
    rows = {}
    for split in splits:
        pairs[split] = setup.pairs[split]
        rows[split] = setup.rows[split]
    return {
        **numerics(config),
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in CODE],
        "weights": setup.origin["model"],
        "adapter": config.lora_r > 0,
        "packed by": packer(config),
        "shared prompts": setup.policy.shared,
        "attention": setup.policy.native_attention,
        "pairs": digest_pairs(pairs),
        "rows": rows,
    }
