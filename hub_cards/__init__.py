"""Cards for what ProCLIP makes: what the Hub shows beside checkpoints and text stores."""

from .adapter import adapter_card
from .converted import converted_card
from .model import model_card
from .quickstart import quickstart_card
from .text_store import text_store_card
from .validity import check_card


__all__ = ["adapter_card", "check_card", "converted_card", "model_card", "quickstart_card", "text_store_card"]
