"""Losses and gradients of preference tuning, reward models and fine-tuning as the field's own trainers compute them.

    python tests/goldens/make_preference_goldens.py --open_instruct=open_instruct --openrlhf=openrlhf/models

with trl 1.16.0, torch 2.13 and transformers 5.23.0 installed, and files of repositories that are no packages: of
allenai/open-instruct at e6c3044a dpo_utils.py, of OpenRLHF at 3c3be623 loss.py and utils.py in these folders. The sum
loss that open-instruct had before its commit bb98dbca was no function: torch's own, as that script called it.

writes preference.npz: four pairs, the chosen chats and then the rejected ones, as `ids` [2N, L], `length` [2N],
`mask` [2N, L] (the answer's tokens), `logits` [2N, L, V] float64, `reference` [2N] (log-probability of the answer);
`scores` [2N] and `margin` [N]; for each oracle loss/NAME, and gradient/NAME by the logits or the scores.
"""

import argparse
import ast
import pathlib
import types
import typing
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

N, L, V = 4, 12, 7


def definitions(path: pathlib.Path, *names: str, **given: object) -> types.SimpleNamespace:
    """Single functions and classes of a file whose other imports are not needed, but for what is given."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(tree.body) == len(names)
    scope = {"torch": torch, "F": F, "nn": nn, "Tuple": tuple, "Optional": typing.Optional} | given
    exec(compile(tree, str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


class Accelerator:
    device = "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather


def stub(**attributes):
    model = types.SimpleNamespace(training=True)
    common = {"model": model, "accelerator": Accelerator(), "_metrics": defaultdict(lambda: defaultdict(list))}
    return types.SimpleNamespace(**common, _total_train_tokens=0, _tp_size=1, **attributes)


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length, prompt = rng.integers(5, L + 1, 2 * N), np.tile(rng.integers(1, 4, N), 2)
    place = np.arange(L)
    return {
        "ids": rng.integers(0, V, (2 * N, L)),
        "length": length,
        "mask": (place >= prompt[:, None]) & (place < length[:, None]),
        "logits": rng.normal(0, 1.5, (2 * N, L, V)),
        "reference": rng.normal(-12, 2, 2 * N),
        "scores": rng.normal(0, 1, 2 * N),
        "margin": rng.uniform(0, 1, N),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--open_instruct", type=pathlib.Path, required=True)
    parser.add_argument("--openrlhf", type=pathlib.Path, required=True)
    options = parser.parse_args()
    open_instruct = definitions(options.open_instruct / "dpo_utils.py", "dpo_loss", "_get_batch_logps")
    masked_mean = definitions(options.openrlhf / "utils.py", "masked_mean").masked_mean
    names = ("aggregate_loss", "SFTLoss", "DPOLoss", "PairWiseLoss")
    openrlhf = definitions(options.openrlhf / "loss.py", *names, masked_mean=masked_mean)
    arrays = inputs()
    given = {name: torch.tensor(value) for name, value in arrays.items()}
    ids, mask, reference = given["ids"], given["mask"], given["reference"]
    labels = ids.masked_fill(~mask, -100)

    def record(name: str, variable: torch.Tensor, loss: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, variable)
        arrays[f"loss/{name}"], arrays[f"gradient/{name}"] = loss.detach().numpy(), gradient.numpy()
        print(f"{name:28} {loss.item():.7f}")

    def per_token(logits: torch.Tensor) -> torch.Tensor:
        """[2N, L - 1], log p(ids[i + 1])."""
        return torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]

    def trl_dpo(loss_type: str, beta: float, logits: torch.Tensor) -> torch.Tensor:
        def model(**_):
            outputs = types.SimpleNamespace(log_probs=per_token(logits) * mask[:, 1:])
            outputs.entropy = outputs.mean_logits = outputs.log_probs.detach()
            outputs.is_top1 = mask[:, 1:]
            return outputs

        trainer = stub(
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            precompute_ref_logps=True,
            aux_loss_enabled=False,
            use_weighting=False,
            label_smoothing=0.0,
        )
        chosen, rejected = reference.chunk(2)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return DPOTrainer._compute_loss(trainer, model, batch, False)

    def logits() -> torch.Tensor:
        return given["logits"].clone().requires_grad_()

    for name, loss_type, beta in (("dpo", "sigmoid", 0.1), ("dpo_norm", "sigmoid_norm", 5.0), ("ipo", "ipo", 0.1)):
        x = logits()
        record(f"trl/{name}", x, trl_dpo(loss_type, beta, x))
    lengths = mask[:, 1:].sum(-1)
    for name, beta, average in (("dpo", 0.1, False), ("dpo_norm", 5.0, True)):
        x = logits()
        padded = F.pad(per_token(x), (0, 1))
        log_probs = open_instruct._get_batch_logps(padded, labels, average_log_prob=average)
        against = reference / lengths if average else reference
        losses, _, _ = open_instruct.dpo_loss(*log_probs.chunk(2), *against.chunk(2), beta=beta)
        record(f"open_instruct/{name}", x, losses.mean())
    for name, beta, ipo, scale in (("dpo", 0.1, False, 1), ("ipo", 0.1, True, lengths)):
        x = logits()
        log_probs = (per_token(x) * mask[:, 1:]).sum(-1) / scale
        loss = openrlhf.DPOLoss(beta, ipo=ipo)
        record(f"openrlhf/{name}", x, loss(*log_probs.chunk(2), *(reference / scale).chunk(2))[0])

    for name, margin, centring in (("plain", None, None), ("margin", given["margin"], None), ("centred", None, 0.01)):
        x = given["scores"].clone().requires_grad_()
        trainer = stub(args=types.SimpleNamespace(center_rewards_coefficient=centring))
        batch = {"attention_mask": torch.ones_like(ids)} | ({} if margin is None else {"margin": margin})
        model = lambda x=x, **_: types.SimpleNamespace(logits=x[:, None])  # noqa: E731
        record(f"trl/reward_{name}", x, RewardTrainer.compute_loss(trainer, model, batch))
        if centring is None:
            x = given["scores"].clone().requires_grad_()
            record(f"openrlhf/reward_{name}", x, openrlhf.PairWiseLoss()(*x.chunk(2), margin))

    for name, reduction, divisor in (("token_mean", "mean", 1), ("conversation_sum", "sum", 2 * N)):
        x = logits()
        loss = F.cross_entropy(x[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction=reduction) / divisor
        record(f"torch/{name}", x, loss)
    # TRL's trainer takes transformers' loss, each of two micro-batches with the number of targets in both.
    x = logits()
    halves = zip(x.chunk(2), labels.chunk(2), strict=True)
    record("trl/token_mean", x, sum(ForCausalLMLoss(*half, V, num_items_in_batch=lengths.sum()) for half in halves))
    x = logits()
    record("openrlhf/token_mean", x, openrlhf.SFTLoss()(per_token(x), mask[:, 1:]))
    np.savez_compressed(pathlib.Path(__file__).parent / "preference.npz", **arrays)


if __name__ == "__main__":
    main()
