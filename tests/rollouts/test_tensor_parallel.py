"""Conversations of models that are split over devices."""

import json

import pytest

from simrl.rollouts.vocabulary import BLOCK
from tests import many_devices
from tests.rollouts import scene


@pytest.mark.long
def test_models_that_are_split_say_the_same() -> None:
    """With caches as on a TPU. Nothing is gathered: no cache, no logits."""
    found = json.loads(many_devices.run('tests.rollouts.tensor_parallel'))
    assert found['said'] > 2 * scene.ROWS
    assert all(found['same'])
    rows, capacities = scene.ROWS // 4, scene.CAPACITIES
    assert found['cache_shards'] == [
        [rows, capacity, 1, spec.config.head_dim]
        for capacity, spec in zip(capacities, scene.SPECS, strict=True)
        for _ in range(2 * spec.config.num_layers)
    ]
    assert found['sent']
    assert {kind for kind, _ in found['sent']} == {'all-reduce', 'collective-permute'}
    vocabularies = [spec.config.padded_vocab_size for spec in scene.SPECS]
    logits = {size // parts for size in vocabularies for parts in (1, 2)} - {BLOCK}  # a block of each row is sent
    assert not [shape for _, shape in found['sent'] if len(shape) == 4 or logits & set(shape)]
