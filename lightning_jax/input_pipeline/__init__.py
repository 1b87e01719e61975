"""From documents to global batches: what stands at each step is a pure function of the seed and the step."""

from lightning_jax.input_pipeline.batches import BatchError, GlobalBatches, validation_batches
from lightning_jax.input_pipeline.cache import cache_folder
from lightning_jax.input_pipeline.config import CorpusConfig, DataConfig, MixtureConfig, TokenizerConfig
from lightning_jax.input_pipeline.errors import DataError
from lightning_jax.input_pipeline.mixture import Mixture, MixtureError
from lightning_jax.input_pipeline.packing import Batch, BestFitRows, PackingError, SplitRows
from lightning_jax.input_pipeline.prepare import PreparedCorpus, prepare
from lightning_jax.input_pipeline.statistics import unigram_cross_entropy
from lightning_jax.input_pipeline.store_building import Progress
from lightning_jax.input_pipeline.token_store import TokenStore, TokenStoreWriter
from lightning_jax.input_pipeline.tokenizer_training import prepare_tokenizer
from lightning_jax.input_pipeline.tokenizers import Tokenizer, encode

__all__ = [
    "Batch",
    "BatchError",
    "BestFitRows",
    "CorpusConfig",
    "DataConfig",
    "DataError",
    "GlobalBatches",
    "Mixture",
    "MixtureConfig",
    "MixtureError",
    "PackingError",
    "PreparedCorpus",
    "Progress",
    "SplitRows",
    "TokenStore",
    "TokenStoreWriter",
    "Tokenizer",
    "TokenizerConfig",
    "cache_folder",
    "encode",
    "prepare",
    "prepare_tokenizer",
    "unigram_cross_entropy",
    "validation_batches",
]
