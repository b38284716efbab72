"""Which words a text may hold and how common each is, as the tokenizer tells.

Tokenizers number their tokens from frequent to rare (WordPiece's vocabularies are sorted so, byte pairs are merged in
that order), which is as public as the tokenizer is, and words of a text follow Zipf's law.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.records import Victim

FIRST = 10  #: added to ranks: the commonest word has 6 % of an English text, not 50
#: What stands in a vocabulary by its alphabet and not by how common it is; ranks of English prose
SINGLES = {".": 1, ",": 1, "a": 5, "'": 10, "i": 15, "s": 15, "-": 20, '"': 20, "t": 40, "?": 60, "!": 100, ":": 100}
LETTERS, MARKS = 200, 500  #: ranks of other letters and digits, and of other marks


def vocabulary(victim: Victim) -> Tensor:
    """Token ids that may stand in a sentence, the commonest first: all but special tokens and unused slots."""
    rows = victim.module.get_input_embeddings().weight.shape[0]
    banned = set(victim.processor.all_special_ids)
    banned |= {i for token, i in victim.processor.get_vocab().items() if token.startswith("[unused")}
    allowed = torch.tensor([i for i in range(rows) if i not in banned])
    return allowed[frequency(victim)[allowed].argsort(descending=True, stable=True)]


def frequency(victim: Victim) -> Tensor:
    """How common each token is, up to a constant: [v] for all that the tokenizer has and all rows of the table."""
    processor = victim.processor
    texts = processor.convert_ids_to_tokens(list(range(len(processor))))
    size = max(len(texts), len(victim.module.get_input_embeddings().weight))
    rank, out = 0, [1 / (len(texts) + FIRST)] * size  # special tokens, unused rows, BERT's thousand unused tokens
    for i, text in enumerate(texts):
        plain = str(text).lstrip("#Ġ▁") or str(text)
        if plain.startswith("[") and plain.endswith("]"):
            continue
        if len(plain) > 1:
            rank += 1
            out[i] = 1 / (rank + FIRST)
        elif plain.isascii():
            own = SINGLES.get(plain, LETTERS if plain.isalnum() else MARKS)
            if str(text).startswith("##"):  # inside a word, where WordPiece never leaves a mark
                own = LETTERS if plain.isalnum() else len(texts)
            out[i] = 1 / (own + FIRST)
    # A vocabulary of characters is in no order.
    return torch.tensor(out) if 2 * rank > len(texts) else torch.ones(size)
