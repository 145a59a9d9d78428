"""An adapter of `grasp finetune` where grasp is not: loaded, run, merged and saved by stock PEFT.

    python tests/doors/stock_peft.py ADAPTER [BASE]

BASE stands in for the name that the adapter has its base by, where that is not to be had. One line
of JSON: what was said, and how far logits are apart (the most, and the most of the base's to the
adapter's).
"""

import json
import sys
import tempfile
from importlib.util import find_spec

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(adapter: str, base: str | None = None) -> None:
    named = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base or named, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "How do I keep bread fresh?"}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    else:
        asked = "How do I keep bread fresh?"
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)
    alone = model(**ids).logits
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    adapted = tuned(**ids).logits
    said = tuned.generate(**ids, max_new_tokens=12, do_sample=False)
    merged = tuned.merge_and_unload()
    after = merged(**ids).logits
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        reloaded = again(**tokenizer(asked, return_tensors="pt", add_special_tokens=False)).logits
    print(
        json.dumps(
            {
                "base": named,
                "grasp": [name for name in ("grasp", "grasp_kernels") if is_there(name)],
                "said": tokenizer.decode(said[0, ids["input_ids"].shape[1] :]),
                "adapter_from_base": float((adapted - alone).abs().max()),
                "merged_from_adapter": float((after - adapted).abs().max()),
                "reloaded_from_merged": float((reloaded - after).abs().max()),
                "largest_logit": float(adapted.abs().max()),
            }
        )
    )


def is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


main(*sys.argv[1:])
