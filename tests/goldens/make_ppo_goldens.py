"""PPO with a value model as Tulu 3's, TRL's and verl's trainers compute it: credit, value loss and policy loss.

    python tests/goldens/make_ppo_goldens.py --open_instruct=ppo_vllm_thread_ray_gtrl.py --trl=ppo_trainer.py \
        --verl=core_algos.py --verl_functions=torch_functional.py

with trl 1.16.0 and torch 2.13 installed, and files of repositories that are no packages here:
open_instruct/ppo_vllm_thread_ray_gtrl.py of allenai/open-instruct at 745bf58d, the last commit that has it;
trl/experimental/ppo/ppo_trainer.py of huggingface/trl at f2cd5771; verl/trainer/ppo/core_algos.py and
verl/utils/torch_functional.py of verl-project/verl at 1dda039b. The first two compute all of it in the middle of a
method of their trainers: its statements, from the penalty for unfinished completions to the advantages and from
predictions to losses, are executed as they stand there.

writes ppo.npz: B completions in rows of T tokens, with `length`, `finished` and `score` [B], `log_prob`, `old`,
`reference`, `values`, `predicted` [B, T] float64; `advantages/NAME`, `returns/NAME`, `value_loss/NAME`,
`value_gradient/NAME`, `clip_share/NAME`, `policy_loss/NAME`, `policy_gradient/NAME`, with NAME of an oracle and, where
rewards are whitened, _whitened.
"""

import argparse
import ast
import pathlib
import types

import numpy as np
import torch
from make_policy_gradient_goldens import VerlConfig, definitions

B, T, STOP, PAD = 6, 9, 7, 0
BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP, PENALTY = 0.05, 0.99, 0.95, 0.2, 0.3, 4.0


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length = np.array([4, 9, 9, 6, 3, 9])
    old = -rng.exponential(1.0, (B, T)) - 0.05
    values = rng.normal(0, 1, (B, T))
    return {
        "length": length,
        "finished": np.array([True, True, False, True, True, False]),
        "score": np.array([10.0, 0.0, 10.0, 10.0, 0.0, 3.0]),
        "old": old,
        "log_prob": old + rng.normal(0, 0.3, (B, T)),
        "reference": old + rng.normal(0, 0.3, (B, T)),
        "values": values,
        "predicted": values + rng.normal(0, 0.5, (B, T)),
    }


def block_with(path: pathlib.Path, name: str) -> list[ast.stmt]:
    """The list of statements, wherever it is nested, in which the variable is assigned."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list) and any(assigns(statement, name) for statement in block):
                return block
    raise LookupError(f"{path}: nothing assigns {name}")


def assigns(statement: ast.stmt, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def run(path: pathlib.Path, first: str, last: str, scope: dict[str, object]) -> None:
    """Executes the statements from where `first` is assigned to where `last` is, for the last time in their block."""
    block = block_with(path, first)
    begin = next(i for i, statement in enumerate(block) if assigns(statement, first))
    end = max(i for i, statement in enumerate(block) if assigns(statement, last))
    module = OneIndexForEachAxis().visit(ast.Module(block[begin : end + 1], []))
    exec(compile(ast.fix_missing_locations(module), str(path), "exec"), scope)


class OneIndexForEachAxis(ast.NodeTransformer):
    """x[[rows, columns]] as torch understood it until 2.9: x[rows, columns]."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.Subscript:
        if isinstance(node.slice, ast.List):
            node.slice = ast.Tuple(node.slice.elts, ast.Load())
        return node


def trainers(
    path: pathlib.Path, arrays: dict[str, np.ndarray], *, penalty: dict[str, object], whiten: bool
) -> dict[str, torch.Tensor]:
    """What open-instruct's and TRL's trainers, which have one origin, compute."""
    functions = definitions(path, "masked_mean", "masked_var", "masked_whiten")
    arguments = types.SimpleNamespace(
        stop_token_id=STOP,
        min_response_length=0,
        beta=BETA,
        kl_coef=BETA,
        kl_estimator="kl1" if "non_stop_penalty" in penalty else "k1",
        whiten_rewards=whiten,
        gamma=GAMMA,
        lam=LAMBDA,
        cliprange=CLIP,
        cliprange_value=VALUE_CLIP,
        **penalty,
    )
    given = {name: torch.tensor(array) for name, array in arrays.items()}
    responses = torch.full((B, T), 5)
    for row, length in enumerate(arrays["length"]):
        responses[row, length - 1] = STOP if arrays["finished"][row] else 5
        responses[row, length:] = PAD
    scope = vars(functions) | {
        "torch": torch,
        "F": torch.nn.functional,
        "INVALID_LOGPROB": 1.0,
        "args": arguments,
        "self": types.SimpleNamespace(args=arguments, processing_class=types.SimpleNamespace(eos_token_id=STOP)),
        "empty_cache": lambda: None,
        "responses": responses,
        "postprocessed_responses": responses,
        "sequence_lengths": given["length"] - 1,
        "scores": given["score"].clone(),
        "logprobs": given["old"],
        "ref_logprobs": given["reference"],
        "values": given["values"],
    }
    run(path, "contain_stop_token" if "non_stop_penalty" in penalty else "contain_eos_token", "advantages", scope)
    vpred = given["predicted"].clone().requires_grad_()
    new_logprobs = given["log_prob"].clone().requires_grad_()
    scope |= {
        "vpred": vpred,
        "new_logprobs": new_logprobs,
        "micro_batch_inds": torch.arange(B),
        "mb_padding_mask_p1": scope["padding_mask_p1"],
        "mb_values": scope["values"],
        "mb_return": scope["returns"],
        "mb_advantage": scope["advantages"],
        "mb_logprobs": scope["logprobs"],
    }
    run(path, "vpredclipped", "vf_loss", scope)
    run(path, "logprobs_diff", "pg_loss", scope)
    (value_gradient,) = torch.autograd.grad(scope["vf_loss"], vpred)
    (policy_gradient,) = torch.autograd.grad(scope["pg_loss"], new_logprobs)
    clipped = scope["vf_losses2"] > scope["vf_losses1"]
    return {
        "advantages": scope["advantages"],
        "returns": scope["returns"],
        "value_loss": scope["vf_loss"],
        "value_gradient": value_gradient,
        "clip_share": functions.masked_mean(clipped.double(), ~scope["padding_mask_p1"]),
        "policy_loss": scope["pg_loss"],
        "policy_gradient": policy_gradient,
    }


def verl_trainer(
    algorithms: pathlib.Path, utilities: pathlib.Path, arrays: dict[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """verl's, with the score at the last token."""
    functions = definitions(utilities, "masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value")
    verl = definitions(
        algorithms,
        "agg_loss",
        "compute_gae_advantage_return",
        "compute_value_loss",
        verl_F=functions,
        Optional=dict,
        ActorConfig=VerlConfig,
    )
    given = {name: torch.tensor(array) for name, array in arrays.items()}
    places = torch.arange(T)
    mask = (places < given["length"][:, None]).double()
    rewards = -BETA * (given["old"] - given["reference"]) * mask
    rewards += given["score"][:, None] * (places == given["length"][:, None] - 1)
    advantages, returns = verl.compute_gae_advantage_return(rewards, given["values"], mask, GAMMA, LAMBDA)
    predicted = given["predicted"].clone().requires_grad_()
    loss, clip_share = verl.compute_value_loss(predicted, returns, given["values"], mask, VALUE_CLIP)
    (gradient,) = torch.autograd.grad(loss, predicted)
    return {
        "advantages": advantages * mask,
        "returns": returns * mask,
        "value_loss": loss,
        "value_gradient": gradient,
        "clip_share": clip_share,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("open_instruct", "trl", "verl", "verl_functions"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    options = parser.parse_args()
    arrays = inputs()
    replaced = {"non_stop_penalty": True, "penalty_reward_value": -10.0}
    results = {"verl": verl_trainer(options.verl, options.verl_functions, arrays)}
    for suffix, whiten in (("", False), ("_whitened", True)):
        results[f"open_instruct{suffix}"] = trainers(options.open_instruct, arrays, penalty=replaced, whiten=whiten)
        subtracted = {"missing_eos_penalty": PENALTY}
        results[f"trl{suffix}"] = trainers(options.trl, arrays, penalty=subtracted, whiten=whiten)
    for name, result in results.items():
        print(f"{name:24} value loss {result['value_loss'].item():.7f}")
        arrays |= {f"{key}/{name}": value.detach().numpy() for key, value in result.items()}
    np.savez_compressed(pathlib.Path(__file__).parent / "ppo.npz", **arrays)


if __name__ == "__main__":
    main()
