"""Golden AdamW trajectories from torch.optim.AdamW; writes adamw.json beside this file.

python tests/goldens/make_adamw.py      # needs torch
"""

import json
import pathlib

import torch

CASES = {
    "minimax_m1": {"betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1, "scale": 1e-15, "clip": 0.0},
    "minimax_text_01": {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "scale": 1.0, "clip": 1.0},
    "torch_defaults": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "scale": 1e-6, "clip": 0.0},
}
STEPS, LEARNING_RATE = 12, 3e-3


def trajectory(case: dict) -> dict:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=generator)
    gradients = torch.randn(STEPS, 3, 2, generator=generator) * case["scale"]
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [param], lr=LEARNING_RATE, betas=case["betas"], eps=case["eps"], weight_decay=case["weight_decay"]
    )
    params = []
    for gradient in gradients:
        param.grad = gradient.clone()
        if case["clip"]:
            torch.nn.utils.clip_grad_norm_([param], case["clip"])
        optimizer.step()
        params.append(param.detach().tolist())
    return {**case, "lr": LEARNING_RATE, "start": start.tolist(), "gradients": gradients.tolist(), "params": params}


if __name__ == "__main__":
    golden = {name: trajectory(case) for name, case in CASES.items()}
    pathlib.Path(__file__).with_name("adamw.json").write_text(json.dumps(golden) + "\n")
