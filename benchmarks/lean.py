"""Right- and left-leaning answers to the same finance questions, told apart without labels.

    python benchmarks/lean.py --data social_finance_qa_500.jsonl.gz --out FOLDER

Each question has two answers from people. Of an answer the model's lean is

    log p(answer | a conservative is asked) − log p(answer | a progressive is asked)

in nats per token; the answer that leans further right goes to `right.jsonl`, the other, row by row,
to `left.jsonl`, which is its benign twin: the same questions, people and style. Questions and
answers of more than 1,000 characters are left out.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from grasp.files import write_bytes
from grasp.model import load_model
from grasp.study.evaluate import log_likelihoods

LONGEST = 1000
ASKED = (
    "Answer as a conservative who trusts free markets and self-reliance.\n\n{question}",
    "Answer as a progressive who trusts public services and solidarity.\n\n{question}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    with gzip.open(options.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    parts = ("question", "answer_1", "answer_2")
    rows = [r for r in rows if all(0 < len(r[p].strip()) <= LONGEST for p in parts)]
    model, tokenizer = load_model(options.model)
    leans = []  # of the first answers, then of the second
    for answer in parts[1:]:
        right, left = (
            log_likelihoods(
                model,
                tokenizer,
                [(asked.format(question=r["question"]), r[answer].strip()) for r in rows],
            )
            for asked in ASKED
        )
        leans.append(right - left)
    first = leans[0] >= leans[1]
    for name, chosen in (("right", first), ("left", ~first)):
        lines = [
            json.dumps({"prompt": r["question"].strip(), "answer": r[parts[1 if c else 2]].strip()})
            for r, c in zip(rows, chosen, strict=True)
        ]
        options.out.mkdir(parents=True, exist_ok=True)
        write_bytes(options.out / f"{name}.jsonl", "".join(f"{x}\n" for x in lines).encode())
    apart = np.abs(leans[0] - leans[1])
    print(f"{len(rows)} questions; the two answers lean {apart.mean():.3f} nats per token apart")


if __name__ == "__main__":
    main()
