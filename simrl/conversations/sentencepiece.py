"""Sentencepiece tokenizers for models that are trained from scratch.

1. `train_sentencepiece` learns the pieces of a language from its texts. Headers of messages are control symbols.
2. `sentencepiece_chat` makes the chat: each header is a single token that no text encodes to.
"""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from simrl.conversations.chat import Chat, EncodingError

BEGIN = '<s>'
SYSTEM_HEADER, USER_HEADER, ASSISTANT_HEADER = '<|system|>', '<|user|>', '<|assistant|>'
END_OF_TURN = '<|end|>'
CONTROLS = (BEGIN, SYSTEM_HEADER, USER_HEADER, ASSISTANT_HEADER, END_OF_TURN)

SPACE = '▁'  # U+2581, a space in sentencepiece; encoding adds one before every text, decoding removes it
_PROBE = ' Aﬁ  '  # outer and double spaces, a capital and a ligature, all of which normalisation would change


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-pair sentencepiece model (Sennrich et al. 2016, arXiv:1508.07909): equal texts give equal bytes.

    Texts are not normalised, every space is kept, and every character that occurs is a piece.

    Args:
        texts: example messages; their order matters only between equally frequent pieces.
        vocab_size: number of ids, including `CONTROLS` and the unknown character.

    Raises:
        ValueError: no texts, or a `vocab_size` that these texts cannot have; the message gives the limit.
    """
    sentences = [text for text in texts if text]
    if not sentences:
        raise ValueError('train_sentencepiece: expected at least one text that is not empty, found none')
    for sentence in sentences:
        _check_text(sentence)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type='bpe',  # integer counts: no rounding that differs between machines
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            max_sentence_length=max(len(sentence.encode()) for sentence in sentences),  # longer ones are dropped
            num_threads=1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            bos_piece=BEGIN,
            control_symbols=[piece for piece in CONTROLS if piece != BEGIN],
        )
    except RuntimeError as error:
        raise ValueError(
            f'train_sentencepiece: cannot make vocab_size={vocab_size} pieces of {len(sentences)} texts: {error}'
        ) from error
    return model.getvalue()


class SentencePieceTokenizer:
    """A sentencepiece model as a `Tokenizer`."""

    def __init__(self, model: bytes | str | os.PathLike[str]) -> None:
        """Reads a model from its bytes or its file.

        Raises:
            ValueError: not a sentencepiece model, or a model that changes texts before it encodes them.
        """
        name = 'sentencepiece model' if isinstance(model, bytes) else str(model)
        content = model if isinstance(model, bytes) else pathlib.Path(model).read_bytes()
        if not content:
            raise ValueError(f'{name}: expected a sentencepiece model, found no bytes')
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f'{name}: not a sentencepiece model: {error}') from error
        self.name = name
        self.size = int(self._processor.get_piece_size())
        self.pieces = tuple(str(self._processor.id_to_piece(i)) for i in range(self.size))
        self.controls = {self.pieces[i]: i for i in range(self.size) if self._processor.is_control(i)}
        unused = {i for i in range(self.size) if self._processor.is_unknown(i) or self._processor.is_unused(i)}
        self.byte_ids = frozenset(i for i in range(self.size) if self._processor.is_byte(i))
        self.decoded_trail = ''
        self.reserved = frozenset(unused | set(self.controls.values()))
        expected = (SPACE + _PROBE).replace(' ', SPACE)
        found = self._processor.normalize(_PROBE)
        if found != expected:
            raise ValueError(
                f'{name}: expected a model that keeps texts as they are, behind one space, found that it turns '
                f'{_PROBE!r} into {found!r} and not {expected!r}'
            )

    def covers(self, text: str) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        """Encodes a text; a character without a piece gives the unknown id."""
        _check_text(text)
        return [int(i) for i in self._processor.encode(text)]

    def encode_raw(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [self.controls[BEGIN]] if add_special_tokens and BEGIN in self.controls else []
        for part in re.split(f'({"|".join(map(re.escape, self.controls))})', text) if self.controls else [text]:
            if part in self.controls:
                ids.append(self.controls[part])
            elif part:
                ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids for reading, with control symbols written out; the text does not encode to the same ids."""
        parts: list[str] = []
        start = 0
        values = [int(i) for i in ids]
        for position, value in enumerate(values):
            if value in self.reserved:
                parts += [self._processor.decode(values[start:position]), self.pieces[value]]
                start = position + 1
        return ''.join([*parts, self._processor.decode(values[start:])])


def sentencepiece_chat(model: bytes | str | os.PathLike[str]) -> Chat:
    """Makes the chat of a sentencepiece model, given as bytes or file, that has `CONTROLS` as control symbols.

    A conversation is `<s>`, then for each message its header, its pieces and `<|end|>`. A system text is a message
    under a header of its own; there is no default system text.

    Raises:
        ValueError: not a sentencepiece model, or control symbols are missing.
    """
    tokenizer = SentencePieceTokenizer(model)
    missing = [piece for piece in CONTROLS if piece not in tokenizer.controls]
    if missing:
        raise ValueError(
            f'{tokenizer.name}: expected the control symbols {CONTROLS}, found {tuple(tokenizer.controls)}, '
            f'without {", ".join(missing)}'
        )
    begin, system, user, assistant, end = (tokenizer.controls[piece] for piece in CONTROLS)
    headers = {'user': (user,), 'assistant': (assistant,)}
    return Chat(
        tokenizer=tokenizer,
        end_of_turn={'user': end, 'assistant': end},
        headers=headers,
        first_headers=headers,
        default_prefix=(begin,),
        system_header=(begin, system),
        system_end=end,
        no_system_reason='',
        reserved=tokenizer.reserved,
    )


def _check_text(text: str) -> None:
    if SPACE in text:
        raise EncodingError(text, SPACE)  # it would be read as a space
