"""What can be wrong with a user's data."""

from lightning_jax.errors import UserError


class DataError(UserError):
    """Base of the errors below: the data, or what the config says of them; the message is one line."""


class SourceError(DataError):
    """A corpus that cannot be read as configured."""


class BadRecordError(DataError):
    """A record that gives no document, where the config says to stop at one; names file and line."""


class TokenizerError(DataError):
    """A tokenizer that does not fit its config."""


class TokenStoreError(DataError):
    """A token store that cannot be trusted; names the file."""
