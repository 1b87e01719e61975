"""The numbers of a stage of reinforcement learning."""

from dataclasses import dataclass
from typing import Literal

from lightning_jax.models.config import ModelConfig
from lightning_jax.objectives.config import AdvantageConfig, PolicyGradientConfig
from lightning_jax.optimizers.config import OptimizerConfig, ScheduleConfig
from lightning_jax.parallel.config import AXES


@dataclass(frozen=True)
class CurriculumConfig:
    """Prompts by how often the policy passes them, as the run measures it or as `pass_rate` of their records says.

    A prompt of which nothing is known is asked.
    """

    start: tuple[float, ...]  # least and most pass rate at the stage's beginning: [0.5, 1] for easy ones
    end: tuple[float, ...]  # at its end; between them both bounds move linearly, by generations
    passing_reward: float  # a completion with at least that is right

    def problems(self) -> list[str]:
        return [
            f"{name}: {list(bounds)} is no range of pass rates, [least, most] within 0 and 1"
            for name, bounds in (("start", self.start), ("end", self.end))
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1
        ]


@dataclass(frozen=True)
class LengthsConfig:
    """Output lengths that grow with what the policy does with them (MiniMax-M1 section 5).

    The next limit holds when both are true of the last `window` generations. The numbers are undisclosed.
    """

    limits: tuple[int, ...]  # of a completion's tokens, growing; the last is max_new_tokens
    window: int  # generations whose means are compared with those of as many before
    perplexity_change: float  # the mean perplexity of completions changes by no more than this share of itself
    length_share: float  # the 99th percentile of their lengths is at least this share of the limit

    def problems(self) -> list[str]:
        found = []
        if len(self.limits) < 2 or list(self.limits) != sorted(set(self.limits)) or self.limits[0] < 1:
            found.append(f"limits: {list(self.limits)} are not two or more growing lengths")
        if self.window < 1:
            found.append(f"window: {self.window} is too small; at least 1")
        if self.perplexity_change <= 0:
            found.append(f"perplexity_change: {self.perplexity_change} is not positive")
        if not 0 < self.length_share <= 1:
            found.append(f"length_share: {self.length_share} is not in (0, 1]")
        return found


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are made. Every token can be drawn: a truncated distribution would not be the policy's."""

    # fast: as the model generates. aligned: also with an fp32 head and without excess precision, for which
    # XLA_FLAGS must say --xla_allow_excess_precision=false; then bf16 is rounded alike in generation and training.
    # exact: the training forward draws, and the model's generation only proposes (lightning_jax/generation/exact.py).
    mode: Literal["fast", "aligned", "exact"]
    samples: int  # completions of each prompt
    updates: int  # optimizer steps on the rollouts of one policy: MiniMax-M1's 16 rounds
    epochs: int  # passes over these rollouts that the updates make: PPO's; 1 trains on every completion once
    # Generations between the policy that makes rollouts and the one that first trains on them. 1: the next rollouts are
    # made before the updates on the present ones, verified meanwhile, and corrected by rollout_correction.
    staleness: Literal[0, 1]
    # A mesh of devices that make rollouts and nothing else, its sizes by axis: {tensor: 4}. The run's mesh is of the
    # others, and with a staleness of 1 both work at the same time. {}: all devices do both in turns.
    devices: dict[str, int]
    max_new_tokens: int  # prompts that leave less than that of the context are left out
    lengths: LengthsConfig | None  # up to max_new_tokens; none: that from the beginning
    # Of each field of records its bounds, [above, below]: {pass_rate: [0, 0.9]} leaves out what is never or nearly
    # always right (MiniMax-M1 section 4.1).
    sample_filter: dict[str, tuple[float, ...]]
    curriculum: CurriculumConfig | None
    temperature: float
    # A completion ends after so many tokens in a row that were each more probable than that (MiniMax-M1 section 3.2).
    repetition_tokens: int  # 0 for never
    repetition_probability: float
    slots: int  # completions that are decoded together
    prefill_tokens: int  # of a prompt's largest pieces
    decode_steps: int  # between two looks of the host
    # DAPO's dynamic sampling: prompts whose completions all have the same reward are replaced by further ones, up to
    # so many times; then the batch has fewer of them, and the run says so.
    dynamic_sampling: bool
    max_refills: int
    correlation_alarm: float  # says where the correlation of probabilities in rollout and trainer is below it
    logged_prompts: int  # of each generation, with all their completions, in samples.jsonl

    def problems(self) -> list[str]:
        least = {"samples": 1, "updates": 1, "epochs": 1, "max_new_tokens": 1, "slots": 1, "decode_steps": 1}
        least |= {"max_refills": 0, "repetition_tokens": 0, "logged_prompts": 0}
        found = [
            f"{name}: {getattr(self, name)} is too small; at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.updates > 0 and self.epochs > 0 and self.updates % self.epochs:
            found.append(f"epochs: {self.epochs} do not divide the {self.updates} updates")
        if self.lengths and self.lengths.limits[-1:] != (self.max_new_tokens,):
            found.append(f"lengths.limits: the last one is not max_new_tokens={self.max_new_tokens}; make it that")
        for name, bounds in self.sample_filter.items():
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                found.append(f"sample_filter.{name}: {list(bounds)} is no range; [above, below]")
        axes = [axis for axis in AXES if axis != "sequence"]  # tokens come one by one
        found += [f"devices.{axis}: no axis; there is {', '.join(axes)}" for axis in self.devices if axis not in axes]
        found += [f"devices.{axis}: {size} is not positive" for axis, size in self.devices.items() if size < 1]
        if self.devices and self.mode == "exact":
            found.append("devices: exact rollouts are drawn by the training forward, where it trains; {} for them")
        if self.prefill_tokens < 16 or self.prefill_tokens % 16:
            found.append(f"prefill_tokens: {self.prefill_tokens} is no positive multiple of 16")
        if self.temperature <= 0:
            found.append(f"temperature: {self.temperature} is not positive; a policy that never explores cannot learn")
        if not 0 < self.repetition_probability < 1:
            found.append(f"repetition_probability: {self.repetition_probability} must lie between 0 and 1")
        if self.samples == 1 and self.dynamic_sampling:
            found.append("samples: with dynamic_sampling at least 2, of which one may be better than the other")
        return found


@dataclass(frozen=True)
class RewardModelUseConfig:
    """A trained reward model as reward "reward_model": (score - shift) / scale, between low and high."""

    folder: str  # of the run that trained it
    shift: float
    scale: float
    low: float
    high: float

    def problems(self) -> list[str]:
        found = [] if self.folder else ["folder: empty; name the run that trained the reward model"]
        if self.scale <= 0:
            found.append(f"scale: {self.scale} is not positive; 1 for the score as it is")
        if self.low >= self.high:
            found.append(f"low: {self.low} is not below high={self.high}")
        return found


@dataclass(frozen=True)
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint, as rewards "graded_judge" and "pairwise_judge"."""

    url: str  # up to where /chat/completions follows: http://localhost:8000/v1
    model: str  # its name there
    api_key_variable: str  # of the environment; "" for a server without a key
    temperature: float
    max_tokens: int
    seconds: float  # for one answer
    threads: int  # questions at the same time

    def problems(self) -> list[str]:
        found = [f"{name}: empty" for name in ("url", "model") if not getattr(self, name)]
        found += [
            f"{name}: {getattr(self, name)} is too small"
            for name, least in (("temperature", 0), ("max_tokens", 1), ("threads", 1))
            if getattr(self, name) < least
        ]
        return found + ([] if self.seconds > 0 else [f"seconds: {self.seconds} is not positive"])


@dataclass(frozen=True)
class RewardConfig:
    """What a completion is worth: the weighted sum of rewards, changed by how it ended."""

    weights: dict[str, float]  # by the names of lightning_jax/reinforcement/grading.py
    reward_model: RewardModelUseConfig | None
    judge: JudgeConfig | None
    code_workers: int  # programs that run at the same time, of reward "code"
    unsafe_code: bool  # without a sandbox, on a machine that anything may happen to
    length_alarm: float  # says where the correlation of reward and length among a prompt's completions is above it
    # Of a completion that was cut or repeats itself. replace: is the reward (Tulu 3); subtract: is taken off it (TRL).
    unfinished: Literal["keep", "replace", "subtract"]
    unfinished_score: float
    # DAPO's overlong penalty: from 0 to -1 over the last so many tokens before max_new_tokens; 0 for none.
    overlong_buffer: int

    def problems(self) -> list[str]:
        found = [] if self.weights else ["weights: no reward; name one"]
        if self.code_workers < 1:
            found.append(f"code_workers: {self.code_workers} is too small; at least 1")
        users = {"reward_model": ("reward_model",), "judge": ("graded_judge", "pairwise_judge", "minimax_m1")}
        for section, names in users.items():
            if getattr(self, section) is None and (used := [name for name in names if name in self.weights]):
                found.append(f"{section}: weights.{used[0]} needs this section")
        if self.overlong_buffer < 0:
            found.append(f"overlong_buffer: {self.overlong_buffer} is negative; 0 for none")
        if self.unfinished == "keep" and self.unfinished_score:
            found.append('unfinished_score: "keep" has no use for it; make it 0')
        if self.unfinished == "subtract" and self.unfinished_score < 0:
            found.append(f"unfinished_score: {self.unfinished_score} is taken off the reward; it cannot be negative")
        return found


@dataclass(frozen=True)
class ValueConfig:
    """A value model beside the policy: parameters, optimizer and schedule of its own (PPO)."""

    # Folder of the run of a reward model, whose parameters it begins with (Tulu 3); "" for the policy's, as the stage
    # begins, and a new head.
    reward_model: str
    model: ModelConfig | None  # of a reward model of another size; none: the policy's
    discount: float  # gamma
    trace: float  # lambda of generalized advantage estimation
    # Where the score of a completion stands. eos: at its last token. after_eos: behind its end token, where a value is
    # predicted too (Tulu 3); that of a cut completion at its last token.
    reward_position: Literal["eos", "after_eos"]
    whiten_rewards: bool  # to variance 1 over a generation's tokens
    whiten_advantages: bool  # also to mean 0
    clip: float  # predictions count as no farther than that from those of the rollouts' time; 0 for none
    coefficient: float  # of the loss
    warmup_steps: int  # first steps of the stage, which train the value alone
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    def problems(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is not in [0, 1]"
            for name in ("discount", "trace")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.model and not self.reward_model:
            found.append("model: a value model that begins as the policy is of its size; none")
        if self.clip < 0:
            found.append(f"clip: {self.clip} is negative; 0 for none")
        if self.coefficient <= 0:
            found.append(f"coefficient: {self.coefficient} is not positive")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps: {self.warmup_steps} is negative; 0 for none")
        return found


@dataclass(frozen=True)
class ReinforcementConfig:
    """Reinforcement learning from verifiable rewards."""

    policy_gradient: PolicyGradientConfig
    advantages: AdvantageConfig
    value: ValueConfig | None  # of advantages.baseline="value"
    rollouts: RolloutConfig
    rewards: RewardConfig

    def problems(self) -> list[str]:
        found = []
        if (self.value is not None) != (self.advantages.baseline == "value"):
            found.append(f'value: belongs to advantages.baseline="value", and this is "{self.advantages.baseline}"')
        if self.rewards.overlong_buffer >= self.rollouts.max_new_tokens:
            found.append(
                f"rewards.overlong_buffer: {self.rewards.overlong_buffer} is not less than "
                f"rollouts.max_new_tokens={self.rollouts.max_new_tokens}"
            )
        return found
