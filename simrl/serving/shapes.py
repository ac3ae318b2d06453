"""The settings of a served model, and the shapes of its programs."""

import dataclasses
import itertools

from simrl.models.transformer import TransformerConfig

LARGEST_CONTEXT = 4096  # tokens, where the settings name none: more takes memory that few requests use
FED_AT_ONCE = 16  # rows
SMALLEST_SIZE = 128  # tokens of a cache that a program reads; with fewer a step is hardly cheaper


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a model's programs.

    Attributes:
        rows: B.
        context: S.
        block: N.
        feed: numbers of rows b, rising, each with the tokens T of a row. Several rows have fewer tokens each: most
            prompts have few that are new, and a call computes what it does not need, too.
        decode_rows: numbers of rows b, rising; B is the last.
        feed_sizes, decode_sizes: tokens of a cache that a program reads, rising; S is the last. To attend to twice as
            many tokens slows sampling down, and hardly the feeding of a chunk.
    """

    rows: int
    context: int
    block: int
    feed: tuple[tuple[int, int], ...]
    decode_rows: tuple[int, ...]
    feed_sizes: tuple[int, ...]
    decode_sizes: tuple[int, ...]

    @property
    def programs(self) -> int:
        """The number of programs."""
        decoding = len(self.decode_rows) * len(self.decode_sizes)
        return len(self.feed) * len(self.feed_sizes) + decoding + 2 * (decoding - 1) + 1


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Rows of a model, and how they are shared."""

    rows: int = 16  # answers at once
    context: int | None = None  # tokens of a prompt and its answer; None: the model's, at most 4,096
    queue: int = 256  # requests that may wait for a row
    chunk: int = 32  # tokens of a prompt that are fed at once; of several prompts half as many each
    block: int = 4  # tokens of a row that are sampled between two reads

    def __post_init__(self) -> None:
        for field, least in (('rows', 1), ('queue', 1), ('chunk', 1), ('block', 1)):
            if getattr(self, field) < least:
                raise ValueError(f'EngineSettings.{field}: expected at least {least}, found {getattr(self, field)}')
        if self.context is not None and self.context < 2:
            raise ValueError(f'EngineSettings.context: expected at least 2, or None, found {self.context}')

    def shapes(self, config: TransformerConfig) -> Shapes:
        """The shapes of a model's programs.

        Raises:
            ValueError: the context is longer than the model's.
        """
        context = min(config.max_row_tokens, LARGEST_CONTEXT) if self.context is None else self.context
        if context > config.max_row_tokens:
            raise ValueError(
                f"EngineSettings.context: expected at most the model's {config.row_limit}, found {context}"
            )
        chunk, block = min(self.chunk, context), min(self.block, context)
        feed_rows = _up_to(min(FED_AT_ONCE, self.rows), 1, 4)
        return Shapes(
            rows=self.rows,
            context=context,
            block=block,
            feed=tuple((rows, chunk if rows == 1 else -(-chunk // 2)) for rows in feed_rows),
            feed_sizes=_up_to(context, max(SMALLEST_SIZE, chunk), 4),
            decode_rows=_up_to(self.rows, 1, 4),
            decode_sizes=_up_to(context, max(SMALLEST_SIZE, block), 2),
        )


def _up_to(largest: int, first: int, factor: int) -> tuple[int, ...]:
    """`first`, `factor` times that and so on, and `largest`: a call does up to `factor` times the work it needs."""
    sizes = itertools.takewhile(lambda size: size < largest, (first * factor**power for power in itertools.count()))
    return (*sizes, largest)
