"""Answers of a language model to sample prompts, decoded greedily, with the template that training used."""

from typing import Any

import torch


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, *, num_tokens: int, device: Any) -> str:
    """One answer to ``prompt``.

    Args:
        model: a causal language model or a PeftModel of one.
        tokenizer: with a chat template, the prompt becomes a user's turn; without, it is continued as text.
        prompt: the user's words; ``system: …`` lines before an empty line become the system prompt.
        num_tokens: longest answer in tokens.
        device: where the model lies.
    """
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            _messages(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: tensor.to(device) for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")}
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _messages(prompt: str) -> list[dict[str, str]]:
    head, separator, rest = prompt.partition("\n\n")
    if separator and head.startswith("system:"):
        system = head.removeprefix("system:").strip()
        return [{"role": "system", "content": system}, {"role": "user", "content": rest}]
    return [{"role": "user", "content": prompt}]
