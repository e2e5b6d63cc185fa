"""Answers of a language model to sample prompts, decoded greedily, with the template that training used."""

from typing import Any

import torch


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompt: str, *, system_prompt: str | None = None, num_tokens: int, device: Any
) -> str:
    """One answer to ``prompt``.

    Args:
        model: a causal language model or a PeftModel of one.
        tokenizer: with a chat template, the prompt becomes a user's turn; without, it is continued as text.
        prompt: the user's words.
        system_prompt: comes before them, where there is a chat template.
        num_tokens: longest answer in tokens.
        device: where the model lies.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        name: tensor.to(device) for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")
    }
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
