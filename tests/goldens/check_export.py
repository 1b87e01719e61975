"""Loads exported folders in transformers and compares its logits with ours.

    python tests/goldens/check_export.py FOLDER...        (torch 2.13, transformers 5.23.0, CPU, fp32)

Each FOLDER is an export with `logits.npz` beside its files: `tokens` and our fp32 `logits`. `--whole-heads` leaves
transformers as it is; else its MiniMax is made to rotate the leading `rotary_dim` dimensions of each head, as the
released modelling code does.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from make_model_goldens import rotate_leading
from transformers import AutoModelForCausalLM


def difference(folder: pathlib.Path, whole_heads: bool) -> float:
    """The largest difference of logits over the largest logit."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"], report
    if model.config.model_type == "minimax" and not whole_heads:
        rotate_leading(model.config.rotary_dim)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    golden = np.load(folder / "logits.npz")
    with torch.no_grad():
        logits = model(torch.tensor(golden["tokens"]), use_cache=False).logits.numpy()
    return float(np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--whole-heads", action="store_true")
    options = parser.parse_args()
    worst = 0.0
    for folder in options.folders:
        found = difference(folder, options.whole_heads)
        print(f"{folder}: {found:.2e}")
        worst = max(worst, found)
    sys.exit(worst > 1e-5)
