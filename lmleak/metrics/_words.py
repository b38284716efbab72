"""Text -> words for ROUGE, in any script."""

from __future__ import annotations

import unicodedata

#: Scripts written without spaces: one character counts as one word, as is usual for ROUGE in Chinese and Japanese.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))


class Words:
    """The tokenizer that rouge-score is given.

    rouge-score's own drops all that is not `a-z0-9`, so that a Russian sentence has no words and any answer to it
    scores 0. Here a word is a run of letters, digits and their marks of any script, in lower case. On ASCII text the
    words are the very same, so scores compare with published ones. A text of symbols alone has its symbols as words.
    """

    def tokenize(self, text: str) -> list[str]:
        """Words of `text` in order."""
        words = "".join(map(_spaced, unicodedata.normalize("NFC", text.lower()))).split()
        return words or [char for char in text if not char.isspace()]


def _spaced(char: str) -> str:
    code = ord(char)
    if any(first <= code <= last for first, last in _UNSPACED):
        return f" {char} "
    return char if unicodedata.category(char)[0] in "LMN" else " "
