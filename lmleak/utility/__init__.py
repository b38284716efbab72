"""What a defense costs: models fine-tuned under it, at one budget, on really labelled data.

`lmleak utility RECIPE` does it for every defense of a recipe; `fine_tune` is one run of it.
"""

from __future__ import annotations

from lmleak.utility._fit import fitted
from lmleak.utility._private import Ghost, trainable
from lmleak.utility._score import mcc, score
from lmleak.utility._train import Plan, fine_tune

__all__ = ["Ghost", "Plan", "fine_tune", "fitted", "mcc", "score", "trainable"]
