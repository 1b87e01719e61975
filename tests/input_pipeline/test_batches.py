"""Global batches depend on the seed and the step only: not on hosts, threads, or where the run was resumed."""

import contextlib
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
from memory_store import memory_store

from lightning_jax.input_pipeline.batches import BatchError, GlobalBatches, validation_batches
from lightning_jax.input_pipeline.config import MixtureConfig
from lightning_jax.input_pipeline.mixture import MixtureError
from lightning_jax.optimizers.batch_size import BatchSizes
from lightning_jax.optimizers.config import BatchSizeConfig

CONTEXT_LENGTH = 16
FIELDS = {"inputs", "targets", "segment_ids", "positions", "loss_mask"}


@dataclass(frozen=True)
class Steps:
    """Batch sizes as listed."""

    sizes: tuple[int, ...]

    @property
    def num_steps(self):
        return len(self.sizes)

    def rows(self, step):
        return self.sizes[step]

    def first_row(self, step):
        return [0, *accumulate(self.sizes)][step]


GROWING = Steps((8,) * 6 + (16,) * 5 + (40,) * 3)


@pytest.fixture(params=["split", "best_fit"])
def packing(request):
    return request.param


@pytest.fixture
def make(tmp_path, packing):
    """Three corpora of different sizes (token ids tell which), the last one growing from nothing."""
    random = np.random.default_rng(0)
    stores = {
        "text": memory_store(tmp_path / "text", random.integers(1, 60, 60), first_token=1),
        "code": memory_store(tmp_path / "code", random.integers(1, 60, 20), first_token=100_000),
        "math": memory_store(tmp_path / "math", random.integers(1, 60, 3), first_token=200_000),
    }
    config = MixtureConfig({"text": 7, "code": 3, "math": 0}, {"text": 2, "code": 1, "math": 1}, packing)

    def make(seed=0, sizes=GROWING, **process):
        return GlobalBatches(stores, config, sizes, CONTEXT_LENGTH, seed=seed, **process)

    return make


def assert_equal_batches(left, right):
    assert left.keys() == right.keys() == FIELDS
    for name in FIELDS:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_hold_consecutive_parts_of_the_same_global_batch(make, hosts):
    whole = make()
    parts = [make(process_index=index, process_count=hosts) for index in range(hosts)]
    for step in range(len(whole)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in FIELDS}
        assert_equal_batches(joined, whole[step])
        assert whole[step]["inputs"].shape == (GROWING.rows(step), CONTEXT_LENGTH)


@pytest.mark.parametrize("first_step", [0, 1, 7, len(GROWING.sizes) - 1, len(GROWING.sizes)])
def test_iterator_resumes_at_any_step(make, first_step):
    batches = make()
    with contextlib.closing(batches.iterator(first_step)) as iterator:
        found = list(iterator)
    assert len(found) == len(batches) - first_step
    for step, batch in enumerate(found, first_step):
        assert_equal_batches(batch, batches[step])


def test_batches_do_not_depend_on_what_was_read_before(make):
    forward, backward = make(), make()
    later = [backward[step] for step in reversed(range(len(backward)))]
    for step, batch in enumerate(reversed(later)):
        assert_equal_batches(forward[step], batch)


def test_same_rows_in_the_same_order_however_they_are_divided_into_steps(make):
    total = sum(GROWING.sizes)
    one_by_one, growing = make(sizes=Steps((1,) * total)), make()
    rows = {name: np.concatenate([growing[step][name] for step in range(len(growing))]) for name in FIELDS}
    for row in (0, 17, 95, total - 1):
        assert_equal_batches(one_by_one[row], {name: array[row : row + 1] for name, array in rows.items()})


def test_seed_decides_the_order_of_the_rows_of_a_corpus(tmp_path, packing):
    store = memory_store(tmp_path, [400])
    config = MixtureConfig({"text": 1}, {"text": 1}, packing)
    first, again, other = (
        GlobalBatches({"text": store}, config, Steps((16,)), CONTEXT_LENGTH, seed=seed)[0]["inputs"][:, 0]
        for seed in (0, 0, 1)
    )
    assert first.tolist() == again.tolist()
    assert np.count_nonzero(first == other) < 8


def test_a_later_stage_reads_each_corpus_on_from_where_the_earlier_one_left_it(tmp_path, packing):
    store = memory_store(tmp_path, [640])
    config = MixtureConfig({"text": 1}, {"text": 1}, packing)

    def make(steps, **more):
        return GlobalBatches({"text": store}, config, Steps((4,) * steps), CONTEXT_LENGTH, seed=0, **more)

    whole, first = make(8), make(3)
    second = make(5, rows_before=first.row_counts(3))
    for step in range(5):
        assert_equal_batches(second[step], whole[3 + step])
    assert second.epochs(5) == whole.epochs(8)


def test_each_pass_over_a_corpus_reads_every_row_once_and_in_another_order(tmp_path, packing):
    store = memory_store(tmp_path, np.random.default_rng(1).integers(2, 40, 12))
    config = MixtureConfig({"text": 1}, {"text": 1}, packing)

    def passes(rows_of_a_pass, count):
        batches = GlobalBatches({"text": store}, config, Steps((rows_of_a_pass,) * count), CONTEXT_LENGTH, seed=0)
        return [batches[step] for step in range(count)]

    pairs = int(np.sum(np.diff(store.offsets) - 1))
    rows = next(n for n in range(1, 100) if passes(n, 1)[0]["loss_mask"].sum() == pairs)
    first, second = passes(rows, 2)
    for batch in (first, second):
        mask = batch["loss_mask"]
        assert len(set(batch["inputs"][mask].tolist())) == mask.sum() == pairs
    assert not np.array_equal(first["inputs"], second["inputs"])


def test_shares_and_epochs_are_as_configured(make):
    batches = make()
    inputs = [batches[step]["inputs"][:, 0] for step in range(len(batches))]
    corpora = np.concatenate(inputs) // 100_000
    num_rows = len(corpora)
    # Integrals of the weights (7:3:0)/10 to (2:1:1)/4 over the stage; three corpora are within 1 + w rows.
    for index, share in enumerate([(0.7 + 0.5) / 2, (0.3 + 0.25) / 2, 0.25 / 2]):
        assert abs(np.count_nonzero(corpora == index) - share * num_rows) < 1.7
    epochs = batches.epochs(len(batches))
    assert epochs.keys() == {"text", "code", "math"}
    assert epochs["math"] > epochs["text"] > 1 > batches.epochs(3)["text"] > 0
    assert set(batches.epochs(0).values()) == {0.0}


def test_corpora_without_a_share_are_never_touched(tmp_path):
    config = MixtureConfig({"text": 1, "code": 0}, {"text": 1, "code": 0}, "split")
    stores = {"text": memory_store(tmp_path, [50]), "code": None}
    assert GlobalBatches(stores, config, Steps((2,)), 8, seed=0)[0]["inputs"].shape == (2, 8)


def test_batch_sizes_of_the_optimizer_package_fit(make):
    config = BatchSizeConfig(tokens=(128, 256), starts=(0, 300), micro_batch_tokens=0)
    batches = make(sizes=BatchSizes(config, CONTEXT_LENGTH, tokens=1000))
    assert [batches[step]["inputs"].shape[0] for step in range(len(batches))] == [8, 8, 8, 16, 16, 16]


def test_batches_that_hosts_cannot_share_are_refused_in_one_line(make):
    with pytest.raises(BatchError) as caught:
        make(sizes=Steps((16, 24)), process_index=0, process_count=16)
    assert str(caught.value) == (
        "batch_size: a batch of 24 rows cannot be divided among 16 hosts; use a multiple of 16 rows"
    )


def test_stage_without_steps_is_refused(make):
    with pytest.raises(BatchError, match="no steps"):
        make(sizes=Steps(()))


@pytest.mark.parametrize("step", [-1, len(GROWING.sizes)])
def test_steps_outside_the_stage_are_refused(make, step):
    with pytest.raises(IndexError, match="of 14 steps"):
        make()[step]


def test_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(MixtureError, match="did you mean 'text'"):
        GlobalBatches(
            {"text": memory_store(tmp_path, [50])},
            MixtureConfig({"test": 1}, {"test": 1}, "split"),
            Steps((2,)),
            8,
            seed=0,
        )


def test_validation_batches_hold_each_row_once_and_end_in_padding(tmp_path):
    store = memory_store(tmp_path, [9, 30, 4, 25])  # 68 tokens: 5 rows of 16
    batches = validation_batches(store, 16, batch_rows=4, num_batches=10)
    assert len(batches) == 2
    inputs, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("inputs", "loss_mask"))
    assert inputs.shape == (8, 16)
    assert len(set(inputs[mask].tolist())) == mask.sum() == 8 + 29 + 3 + 24
    assert not np.concatenate([batch["segment_ids"] for batch in batches])[5:].any()


def test_validation_batches_are_the_same_for_any_number_of_hosts(tmp_path):
    store = memory_store(tmp_path, [200])
    whole = validation_batches(store, 8, batch_rows=4, num_batches=3)
    hosts = [
        validation_batches(store, 8, batch_rows=4, num_batches=3, process_index=p, process_count=2) for p in range(2)
    ]
    assert len(whole) == 3
    for batch, *parts in zip(whole, *hosts, strict=True):
        assert_equal_batches(batch, {name: np.concatenate([part[name] for part in parts]) for name in FIELDS})
