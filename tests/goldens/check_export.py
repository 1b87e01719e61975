"""Loads exported folders in transformers and compares its logits, or a reward model's scores, with ours.

    python tests/goldens/check_export.py FOLDER...        (torch 2.13, transformers 5.23.0, CPU, fp32)

Each FOLDER is an export with `logits.npz` beside its files: `tokens` and our fp32 `logits`, for a reward model `[N,
1]`: those of each row's last token. `--whole-heads` leaves transformers as it is; else its MiniMax is made to rotate
the leading `rotary_dim` dimensions of each head, as the released modelling code does.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_model_goldens import rotate_leading
from transformers import AutoConfig


def difference(folder: pathlib.Path, whole_heads: bool) -> float:
    """The largest difference of logits over the largest logit."""
    architecture = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    given = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, report = architecture.from_pretrained(folder, **given, output_loading_info=True)
    # The decays follow from the config.
    missing = {key for key in report["missing_keys"] if not key.endswith(("decay", "slope_rate"))}
    assert not report["unexpected_keys"] | missing, report
    if model.config.model_type == "minimax" and not whole_heads:
        rotate_leading(model.config.rotary_dim)
        model = architecture.from_pretrained(folder, **given)
    golden = np.load(folder / "logits.npz")
    with torch.no_grad():  # one row at a time: a reward model may have no token for padding
        rows = [model(torch.tensor(row[None]), use_cache=False).logits.numpy() for row in golden["tokens"]]
    logits = np.concatenate(rows)
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
