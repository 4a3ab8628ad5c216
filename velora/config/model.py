"""A network, its preprocessing and its roles (the group `model`)."""

from velora.models.encoder import Encoder
from velora.models.llama import Llama
from velora.models.minilm import MiniLM
from velora.models.vit import ViT

__all__ = ["Encoder", "Llama", "MiniLM", "ViT"]
