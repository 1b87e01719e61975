"""Losses, gradients and advantages of reinforcement learning as the field's own trainers compute them.

    python tests/goldens/make_policy_gradient_goldens.py --verl=core_algos.py --verl_functions=torch_functional.py \
        --slime=ppo_utils.py --open_instruct=grpo_utils.py --open_instruct_models=model_utils.py \
        --open_instruct_rl=rl_utils.py

with trl 1.16.0 and torch 2.13 installed, and files of repositories that are no packages here:
verl/trainer/ppo/core_algos.py and verl/utils/torch_functional.py of verl-project/verl at 1dda039b,
slime/utils/ppo_utils.py of THUDM/slime at 624b824a, open_instruct/grpo_utils.py, model_utils.py and rl_utils.py of
allenai/open-instruct at e6c3044a.

writes policy_gradient.npz: B completions of up to T tokens, two groups of them, with `mask`, `log_prob`, `old`,
`recorded`, `reference` [B, T] and `advantage` [B] float64; for each oracle loss/NAME and gradient/NAME, by the
log-probabilities. Further `scores` [P, G] with advantages/NAME, and `values`, `predicted`, `token_rewards` [B, T] with
gae/NAME, returns/NAME, value_loss/NAME.
"""

import argparse
import ast
import pathlib
import types
from collections import defaultdict

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

B, T, P, G = 6, 9, 2, 3
LONGEST = 12  # Dr. GRPO's constant


def definitions(path: pathlib.Path, *names: str, **scope: object) -> types.SimpleNamespace:
    """Single functions and classes of a file whose other imports are not needed, without decorators and annotations."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(tree.body) == len(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
    scope = {"torch": torch, "np": np, "defaultdict": defaultdict, **scope}
    exec(compile(tree, str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


class VerlConfig(types.SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length = rng.integers(3, T + 1, B)
    old = -rng.exponential(1.0, (B, T)) - 0.05
    return {
        "mask": np.arange(T) < length[:, None],
        "old": old,
        "log_prob": old + rng.normal(0, 0.5, (B, T)),
        "recorded": old + rng.normal(0, 0.4, (B, T)),
        "reference": old + rng.normal(0, 0.3, (B, T)),
        "advantage": rng.normal(0, 1, B),
        "scores": np.array([[1.0, 0.0, 1.0], [0.5, 0.25, -1.0]]),
        "values": rng.normal(0, 1, (B, T)),
        "predicted": rng.normal(0, 1, (B, T)),
        "token_rewards": rng.normal(0, 1, (B, T)) * (np.arange(T) == length[:, None] - 1),
    }


def trl_loss(log_prob: torch.Tensor, given: dict[str, torch.Tensor], **settings: object) -> torch.Tensor:
    correction = settings.pop("correction", None)
    defaults = {
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "delta": None,
    }
    chosen = types.SimpleNamespace(**(defaults | settings))
    arguments = types.SimpleNamespace(delta=chosen.delta, use_bias_correction_kl=False, steps_per_generation=1)

    class Accelerator:
        num_processes, sync_gradients = 1, True

        def gather(self, x):
            return x

        gather_for_metrics = gather

        def reduce(self, x, reduction):
            return x

    trainer = types.SimpleNamespace(
        **vars(chosen),
        args=arguments,
        accelerator=Accelerator(),
        model=types.SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_prob, torch.zeros_like(log_prob), None),
    )
    mask = given["mask"].long()
    batch = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": given["advantage"],
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": correction,
    }
    return GRPOTrainer._compute_loss(trainer, None, batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    files = ("verl", "verl_functions", "slime", "open_instruct", "open_instruct_models", "open_instruct_rl")
    for name in files:
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    options = parser.parse_args()
    functions = definitions(
        options.verl_functions, "masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"
    )
    verl_names = (
        "agg_loss",
        "compute_policy_loss_vanilla",
        "compute_policy_loss_gspo",
        "compute_policy_loss_cispo",
        "kl_penalty_forward",
        "compute_gae_advantage_return",
        "compute_grpo_outcome_advantage",
        "compute_rloo_outcome_advantage",
        "compute_value_loss",
    )
    verl = definitions(
        options.verl, *verl_names, verl_F=functions, Optional=dict, ActorConfig=VerlConfig, AlgoConfig=int
    )
    slime = definitions(options.slime, "compute_cispo_loss")
    models = definitions(options.open_instruct_models, "estimate_kl")
    loss_types = types.SimpleNamespace(dapo="dapo", cispo="cispo")
    open_instruct = definitions(options.open_instruct, "compute_grpo_loss", GRPOLossType=loss_types, model_utils=models)
    rl_utils = definitions(options.open_instruct_rl, "calculate_advantages")

    arrays = inputs()
    given = {name: torch.tensor(value) for name, value in arrays.items()}
    mask, old, advantage_BT = given["mask"], given["old"], given["advantage"][:, None].expand(B, T)

    def record(name: str, loss_of) -> None:
        log_prob = given["log_prob"].clone().requires_grad_()
        loss = loss_of(log_prob)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        arrays[f"loss/{name}"], arrays[f"gradient/{name}"] = loss.detach().numpy(), gradient.numpy()
        print(f"{name:28} {loss.item():.7f}")

    ratio_of_rollouts = torch.exp(old - given["recorded"])
    band = torch.where((ratio_of_rollouts >= 0.8) & (ratio_of_rollouts <= 1.25), ratio_of_rollouts, 0.0)
    for name, settings in {
        "ppo": {},
        "grpo": {"loss_type": "grpo"},
        "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
        "dr_grpo": {"loss_type": "dr_grpo"},
        "dapo": {"epsilon_high": 0.28},
        "dual_clip": {"delta": 1.5},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
        "truncated": {"correction": ratio_of_rollouts.clamp(max=1.1)},
        "icepop": {"correction": band},
    }.items():
        record(f"trl/{name}", lambda x, settings=settings: trl_loss(x, given, **settings))

    def verl_config(low: float, high: float, dual_clip: float = 1e9) -> VerlConfig:
        return VerlConfig(
            clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual_clip, global_batch_info={}
        )

    for name, function, mode, config in (
        ("ppo", verl.compute_policy_loss_vanilla, "token-mean", verl_config(0.2, 0.2)),
        ("grpo", verl.compute_policy_loss_vanilla, "seq-mean-token-mean", verl_config(0.2, 0.2)),
        ("dapo", verl.compute_policy_loss_vanilla, "token-mean", verl_config(0.2, 0.28)),
        ("dual_clip", verl.compute_policy_loss_vanilla, "token-mean", verl_config(0.2, 0.2, 1.5)),
        ("gspo", verl.compute_policy_loss_gspo, "seq-mean-token-mean", verl_config(0.1, 0.1)),
        ("cispo", verl.compute_policy_loss_cispo, "token-mean", verl_config(1.0, 0.2)),
        ("cispo_both_sides", verl.compute_policy_loss_cispo, "token-mean", verl_config(0.2, 0.2)),
    ):
        record(f"verl/{name}", lambda x, f=function, m=mode, c=config: f(old, x, advantage_BT, mask, m, c)[0])

    def slime_cispo(log_prob: torch.Tensor) -> torch.Tensor:
        losses, _ = slime.compute_cispo_loss(old - log_prob, log_prob, advantage_BT, 1.0, 0.2)
        return losses[mask].mean()

    record("slime/cispo", slime_cispo)
    for name, high in (("dapo", 0.28), ("cispo", 0.2)):

        def open_instruct_loss(log_prob: torch.Tensor, name=name, high=high) -> torch.Tensor:
            config = types.SimpleNamespace(loss_fn=name, clip_lower=0.2, clip_higher=high)
            ratio = torch.exp(log_prob - old)
            return open_instruct.compute_grpo_loss(log_prob, ratio, advantage_BT, None, config, torch.tensor(1.0))[0][
                mask
            ].mean()

        record(f"open_instruct/{name}", open_instruct_loss)
    for place, name in enumerate(("k1", "k2", "k3")):
        record(f"verl/{name}", lambda x, k=name: verl.kl_penalty_forward(x, given["reference"], k)[mask].mean())
        record(
            f"open_instruct/{name}",
            lambda x, p=place: models.estimate_kl(x - given["reference"], torch.ones_like(x))[p][mask].mean(),
        )

    index, scores = np.repeat(np.arange(P), G), given["scores"].reshape(-1, 1)
    ones = torch.ones_like(scores)
    for name, function, more in (
        ("grpo", verl.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": True}),
        ("dr_grpo", verl.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}),
        ("leave_one_out", verl.compute_rloo_outcome_advantage, {}),
    ):
        arrays[f"advantages/verl/{name}"] = function(scores.clone(), ones, index, **more)[0].reshape(P, G).numpy()
    values, rewards = given["values"], given["token_rewards"]
    gae = verl.compute_gae_advantage_return(rewards, values, mask.double(), 0.99, 0.95)
    arrays["gae/verl"], arrays["returns/verl"] = (each.numpy() for each in gae)
    gae = rl_utils.calculate_advantages(values.numpy(), rewards.numpy(), 0.99, 0.95)
    arrays["gae/open_instruct"], arrays["returns/open_instruct"] = gae
    value_loss, _ = verl.compute_value_loss(given["predicted"], values + 0.3, values, mask, 0.2)
    arrays["value_loss/verl"] = value_loss.numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "policy_gradient.npz", **arrays)


if __name__ == "__main__":
    main()
