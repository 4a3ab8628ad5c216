"""Data, loss and scores (the group `task`)."""

from velora.data.c4 import C4
from velora.data.digits import Digits
from velora.data.embedded import Embedded
from velora.data.glue import Glue
from velora.data.manual import Manual
from velora.data.topics import Topics
from velora.data.vtab import VTAB

__all__ = ["C4", "VTAB", "Digits", "Embedded", "Glue", "Manual", "Topics"]
