"""The libraries that describe texts, each with its model in its package; the extra `fidelity` installs them.

Each function here makes an annotator. `Annotators` names the functions, so that another may take the place of each. A
measure whose package is not installed is not measured, and the reason is kept beside the results.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

IsWord = Callable[[str], bool]  # a word in lower case -> True if it is spelt as in the dictionary
Tag = Callable[[Sequence[str]], Sequence[str]]  # the tokens of a text -> a part of speech for each
Sentiment = Callable[[str], float]  # a text -> from -1, negative, to 1, positive
Embed = Callable[[Sequence[str]], np.ndarray]  # N texts -> float32 [N, D], of length 1
_HERE = 'simrl.evaluation.fidelity'


class MissingPackageError(ImportError):
    """A package of the extra `fidelity` is not installed."""


@dataclasses.dataclass(frozen=True)
class Annotators:
    """Functions without arguments that make annotators, as 'module:function'; '': what needs one is not measured."""

    words: str = f'{_HERE}.annotators:dictionary'  # makes an `IsWord`
    tags: str = f'{_HERE}.annotators:tagger'  # makes a `Tag`
    sentiment: str = f'{_HERE}.annotators:vader'  # makes a `Sentiment`
    embeddings: str = f'{_HERE}.embeddings:minilm'  # makes an `Embed`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) and value.count(':') != 1:
                raise ValueError(f"Annotators.{field.name}: expected 'module:function' or '', found {value!r}")

    def make(self, name: str) -> Any:
        """Makes the annotator of a field.

        Raises:
            MissingPackageError: there is none, or its package is not installed.
            ValueError: there is no such function.
        """
        named = {'words': self.words, 'tags': self.tags, 'sentiment': self.sentiment, 'embeddings': self.embeddings}
        if not (value := named[name]):
            raise MissingPackageError(f'no annotator is named for {name}')
        module, _, function = value.partition(':')
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f'Annotators.{name}: expected a function {value!r}, found: {error}') from error
        return found()


def package(module: str, name: str) -> Any:
    """Imports a module of the extra `fidelity`.

    Args:
        name: of the package that has it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the package {name} is not installed ({error}): pip install 'simrl[fidelity]'"
        ) from error


def dictionary() -> IsWord:
    """pyspellchecker's English word list, of words that are frequent in subtitles (MIT)."""
    words = package('spellchecker', 'pyspellchecker').SpellChecker(language='en').word_frequency
    return lambda word: word.replace('’', "'") in words


def tagger() -> Tag:
    """HanTa's English model (Wartena 2019, "A Probabilistic Morphology Model for German Lemmatization"; LGPL).

    Its tags are the C5 tagset of the British National Corpus.
    """
    model = package('HanTa.HanoverTagger', 'HanTa').HanoverTagger('morphmodel_en.pgz')
    return lambda tokens: [tag for _, _, tag in model.tag_sent(list(tokens))]


def vader() -> Sentiment:
    """VADER's compound score, by a lexicon and rules (Hutto & Gilbert 2014; MIT)."""
    analyser = package('vaderSentiment.vaderSentiment', 'vaderSentiment').SentimentIntensityAnalyzer()
    return lambda text: float(analyser.polarity_scores(text)['compound'])
