"""Pretrain the organism: `python -m grasp.organism.pretrain --seed 0 --out FOLDER`, 15 minutes."""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grasp.organism.world import World

STEPS, DOCUMENTS, LEARNING_RATE, WARMUP = 2000, 128, 1.5e-3, 100


TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
"""What is said, one word after the other: an answer is one word, and has no end."""


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token a word, `<s>` in front."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *world.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def build_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pretrain(seed: int, steps: int = STEPS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch on fresh documents of `World(seed)`; the loss is over every token."""
    torch.manual_seed(seed)
    world, rng = World(seed), np.random.default_rng([seed, 1])
    tokenizer = build_tokenizer(world)
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    progress = trange(steps, desc="pretrain")
    for step in progress:
        share = min((step + 1) / WARMUP, 0.5 * (1 + np.cos(np.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        documents = [world.document(rng) + " </s>" for _ in range(DOCUMENTS)]
        batch = tokenizer(documents, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and tokenizer")
    options = parser.parse_args()
    model, tokenizer = pretrain(options.seed, options.steps)
    model.to(torch.float16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
