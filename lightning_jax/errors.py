"""The base of every error that is the user's to mend."""


class UserError(ValueError):
    """Something that the user has to change: each line of the message says what is wrong, where, what would be right.

    Commands print the message without a traceback; libraries may catch it like any ValueError.
    """
