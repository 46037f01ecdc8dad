"""Answers that a model gives to prompts: greedy ones, for the report."""

import torch
import transformers


@torch.no_grad()
def greedy_answers(policy, tokenizer, pairs, end_of_turn, max_new_tokens=128):
    """The likeliest next token, again and again, after the prompts of some pairs.

    policy       has a `model`, and transformers' `generate` for it
    pairs        list with prompt_ids each
    end_of_turn  token id that ends an answer
    returns      list of str, without special tokens
    """
    # a config of its own: the model's may sample, or punish repetition
    greedy = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_of_turn
    )
    answers = []
    for pair in pairs:
        prompt = torch.tensor([pair.prompt_ids], device=policy.model.device)
        output = policy.generate(prompt, greedy, attention_mask=torch.ones_like(prompt))
        answer = output[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return answers
