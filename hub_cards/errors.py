"""What publishing refuses."""


class PublishError(ValueError):
    """What is to be published is not complete, or the Hub did not take it. The message says what to do."""
