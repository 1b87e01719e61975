"""What a training run shows: the same text whenever the parameters are, on any layout."""

import jax
import pytest
from tiny_generation import CONFIG, PROMPTS, generator, ordered, params

from lightning_jax import parallel
from lightning_jax.generation import Sampling, sample_prompts

ONE_DEVICE = parallel.make_mesh(parallel.MeshConfig.of(), jax.devices()[:1])


def samples(params, mesh, prompts=PROMPTS[:3], temperature=0.0, seed=0):
    return sample_prompts(CONFIG, params, prompts, num_tokens=6, temperature=temperature, seed=seed, mesh=mesh)


def test_samples_are_completions_of_the_prompts_in_their_order():
    greedy = Sampling(max_new_tokens=6, temperature=0.0)
    expected = [completion.ids for completion in ordered(generator().generate(PROMPTS[:3], greedy))]
    assert samples(params(), ONE_DEVICE) == expected


def test_seed_decides_the_samples_and_a_second_run_repeats_them():
    first, again, other = (samples(params(), ONE_DEVICE, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "sequence"])
def test_a_layout_fills_up_its_rows(axis):
    mesh = parallel.make_mesh(parallel.MeshConfig.of(fsdp=2, tensor=2, **{axis: 2}))
    laid_out = jax.device_put(params(), parallel.shardings(params(), mesh))
    assert samples(laid_out, mesh) == samples(params(), ONE_DEVICE)
