"""Programs for machines that are not here: their account, and one tiny config compiled for CPU devices."""

import collections
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from configs import paper
from simrl.conversations.chat import ASSISTANT, USER
from simrl.experiments.experiment import settings_of
from simrl.rollouts.dialogue import capacity
from simrl.run.config import ConfigError
from tools.benchmark.limits import weights_of
from tools.compile_check import machines, scaling
from tools.compile_check.__main__ import compile_all
from tools.compile_check.architectures import PUBLISHED
from tools.compile_check.check import Checked, check_mesh, conversation_bound
from tools.compile_check.hlo import KINDS, Sent, collectives
from tools.compile_check.machines import CHIPS, mesh_shape, topology_of
from tools.compile_check.measure import Measured, extrapolated, fewer_layers
from tools.compile_check.operations import operations
from tools.compile_check.peers import Peers, peers_of
from tools.compile_check.roofline import Group, rounds_of, sent_seconds, step_limits, wire_bytes
from tools.compile_check.work import walk, works_of

ROOT = pathlib.Path(__file__).parents[2]
BODY = """HloModule jit_f, is_scheduled=true, num_partitions=8

%summed (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%known_body (x: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %two = s32[]{:T(128)} constant(2)
  %counter = s32[]{:T(128)} get-tuple-element(%x), index=0
  %kernel = bf16[4,8]{1,0} custom-call(%y), frontend_attributes={kernel_metadata={
"block": 512
}}, metadata={op_name="jit(f)/kernel"}
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%kernel), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %fusion.3 = f32[8]{0} fusion(%all-gather.1), kind=kOutput, calls=%fused
  %next = s32[]{:T(128)} add(%counter, %two)
  ROOT %both = (s32[], bf16[2,8]) tuple(%next, %fusion.3)
}

%fused (p: bf16[4,8]) -> f32[8] {
  ROOT %all-reduce.5 = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%summed
}

%started (q: f32[2]) -> (f32[2], f32[8], s32[2], u32[]) {
  %all-gather.8 = f32[8]{0} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %start = (f32[2]{0}, f32[8]{0}, s32[2]{0}, u32[]) custom-call(%all-gather.8)
}

%ended (q: f32[2]) -> f32[8] {
  ROOT %all-gather.9 = f32[8]{0} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%below_10 (x: (s32[], bf16[2,8])) -> pred[] {
  %ten = s32[] constant(10)
  %counter.2 = s32[] get-tuple-element(%x), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter.2, %ten), direction=LT
}

%end (x: (s32[], f32[16])) -> pred[] {
  %all-reduce.9 = pred[] all-reduce(%x), replica_groups={}, to_apply=%summed
  ROOT %done.2 = pred[] get-tuple-element(%x), index=1
}

%unknown_body (x: (s32[], f32[16])) -> (s32[], f32[16]) {
  %all-reduce.7 = (f32[16]{0}, s32[]) all-reduce(%x, %n), replica_groups=OF_ROWS, to_apply=%summed
  %while.2 = (s32[], bf16[2,8]) while(%t), condition=%below_10, body=%known_body, backend_config={NOTED}
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %zero = s32[] constant(0)
  %zero.2 = s32[] copy(%zero)
  %whole = f32[16]{0} parameter(0)
  %share = f32[4]{0} reduce-scatter(f32[16]{0} %whole), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%summed
  %async-collective-start = (f32[2]{0}, f32[8]{0}, s32[2]{0}, u32[]) fusion(%share), calls=%started
  %async-collective-done = f32[8]{0} fusion(%async-collective-start), calls=%ended
  %first = (s32[], bf16[2,8]) tuple(%zero.2, %x)
  %while.1 = (s32[], f32[16]) while(%t), condition=%end, body=%unknown_body, metadata={op_name="jit(f)/a/b/c/while"}
  %while.3 = (s32[], bf16[2,8]) while(%first), condition=%below_10, body=%known_body
  %permute = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %done = f32[4]{0} collective-permute-done(%permute)
}
"""  # the other loop counts to 10 by twos
BODY = BODY.replace('NOTED', '"known_trip_count":{"n":"3"}').replace('OF_ROWS', "mesh['a'=2,'b'=4] {'b'}")
OF_ROWS, ACROSS, ALL = Peers(4, 4), Peers(2, 5), Peers(8, 8)  # of a mesh of 2 x 4


def absent_mesh(data, model):
    return jax.sharding.AbstractMesh((data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def paper_work(*arms, **compute):
    config = paper.get_config(','.join(arms)).to_dict()
    config['compute'] |= compute
    return list(works_of(settings_of(config)))


def test_collectives_count_as_often_as_known_loops_run_them():
    found = collectives(BODY)
    assert found == {
        ('', 'all-gather', ACROSS): Sent(5, 5 * 4 * 8 * 2),
        ('', 'all-gather', OF_ROWS): Sent(1, 8 * 4),
        ('', 'all-reduce', OF_ROWS): Sent(5, 5 * 8 * 4),
        ('', 'collective-permute', ACROSS): Sent(1, 16),
        ('', 'reduce-scatter', OF_ROWS): Sent(1, 16 * 4),
        ('a/b/c', 'all-reduce', ALL): Sent(1, 1),
        ('a/b/c', 'all-reduce', OF_ROWS): Sent(1 + 3, 16 * 4 + 4 + 3 * 8 * 4),
        ('a/b/c', 'all-gather', ACROSS): Sent(3, 3 * 4 * 8 * 2),
    }
    with pytest.raises(ValueError, match='a line that begins with ENTRY'):
        collectives('module {}')


@pytest.mark.parametrize(
    ('text', 'number', 'reach'),
    [
        ('replica_groups={}, use_global_device_ids=true', 16, 16),
        ('replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, to_apply=%f', 4, 13),
        ('replica_groups=[4,4]<=[16], dimensions={0}', 4, 4),
        ('replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}', 4, 13),
        ("replica_groups=mesh['a'=4,'b'=4] {'a'}, to_apply=%f", 4, 13),
        ("replica_groups=mesh['a'=4,'b'=4] {'a','b'}, to_apply=%f", 16, 16),
        # By columns the first axis is that of the rows' devices: 0, 1, 2, 3.
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'a'}, to_apply=%f", 4, 4),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1,'d'=2] {'b'}, dimensions={1}", 2, 3),  # 0, 2
        ("replica_groups=mesh['a'=4,'b'=4] {'b':(1)2}, dimensions={1}", 2, 3),
        ("replica_groups=mesh['a'=4,'b'=4] {'b':(2)2}, dimensions={1}", 2, 2),  # 0, 1
        ('source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5}}, metadata={}', 2, 4),
        ('source_target_pairs={{0,0},{1,4}}', 2, 4),
    ],
)
def test_the_devices_of_a_collective(text, number, reach):
    assert peers_of(f'%x = f32[] all-gather(%y), channel_id=1, {text}', 16) == Peers(number, reach)
    with pytest.raises(ValueError, match="expected replica_groups that are known, found '%x = "):
        peers_of('%x = f32[] all-gather(%y), channel_id=1', 16)


@pytest.mark.parametrize('devices', [1, 2, 5, 8])
def test_bytes_of_rings_are_those_that_are_passed_on(devices):
    """Against a ring that passes shares on until each device has all, and sums until each has the sum of its share."""
    share, has = 3.0, [{device} for device in range(devices)]
    gathered, last = 0.0, list(range(devices))
    while len(has[0]) < devices:
        last, gathered = [last[device - 1] for device in range(devices)], gathered + share
        for device, block in enumerate(last):
            has[device].add(block)
    scattered, summed = 0.0, [1] * devices  # terms in the sum that a device passes on next
    while summed[0] < devices:
        summed, scattered = [summed[device - 1] + 1 for device in range(devices)], scattered + share
    assert all(len(blocks) == devices for blocks in has)
    whole = devices * share
    assert wire_bytes('all-gather', devices, whole) == pytest.approx(gathered)
    assert wire_bytes('reduce-scatter', devices, whole) == pytest.approx(scattered)
    assert wire_bytes('all-reduce', devices, whole) == pytest.approx(scattered + gathered)


def test_bytes_of_collectives_by_hand():
    found = {kind: wire_bytes(kind, 4, 100.0) for kind in KINDS}
    assert found == {
        'all-gather': 75.0,
        'all-reduce': 150.0,
        'all-to-all': 75.0,
        'collective-broadcast': 150.0,
        'collective-permute': 100.0,
        'ragged-all-to-all': 75.0,
        'reduce-scatter': 75.0,
    }


def test_operations_are_those_of_the_products():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(w, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    product = 2 * 3 * 5 * 5  # [3, 5] x [5, 5]
    w, x = jax.ShapeDtypeStruct((7, 5, 5), 'float32'), jax.ShapeDtypeStruct((3, 5), 'float32')
    assert operations(jax.jit(loss).trace(w, x).jaxpr) == {'': 7 * product}
    # The gradient: forward, once more for want of what was not kept, and twice backward.
    assert operations(jax.jit(jax.grad(loss)).trace(w, x).jaxpr) == {'': 7 * 4 * product}

    def loop(w, x):
        with jax.named_scope('decode'):
            x = jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ w[0], x)
        return jax.lax.cond(x[0, 0] > 1, lambda: x @ w[1] @ w[2], lambda: x @ w[1])

    assert operations(jax.jit(loop).trace(w, x).jaxpr) == {'decode': product, '': 2 * product}


@pytest.mark.parametrize('layers', [{'user': 48, 'assistant': 36}, {'user': 28, 'assistant': 61}, {'assistant': 36}])
@pytest.mark.parametrize('few', [1, 2, 3])
def test_all_layers_follow_from_few(layers, few):
    def program(depth):
        size = 100.0 + sum(number * {'user': 7, 'assistant': 3}[side] for side, number in depth.items())
        sent = {('', 'all-reduce', ALL): Sent(size, 2 * size)}
        return Measured('x', 1, (), {'temporaries': size}, {'': 4 * size}, sent, seconds=1.0)

    depths = fewer_layers(layers, few)
    assert all(few <= number <= 4 * few for depth in depths for number in depth.values())
    assert len(depths) <= 1 + len(layers)
    found, true = extrapolated([program(depth) for depth in depths], depths, layers), program(layers)
    assert found.bytes == pytest.approx(true.bytes)
    assert found.operations == pytest.approx(true.operations)
    assert found.sent['', 'all-reduce', ALL] == pytest.approx(true.sent['', 'all-reduce', ALL])
    assert found.seconds == len(depths)


def test_published_sizes_have_the_published_numbers_of_parameters():
    billions = {
        'Qwen/Qwen2.5-1.5B-Instruct': 1.54,
        'Qwen/Qwen2.5-3B-Instruct': 3.09,
        'Qwen/Qwen2.5-7B-Instruct': 7.61,
        'Qwen/Qwen2.5-14B-Instruct': 14.7,
        'Qwen/Qwen2.5-32B-Instruct': 32.5,
        'Qwen/Qwen3-14B': 14.8,
        'Qwen/Qwen3-32B': 32.8,
        'meta-llama/Llama-3.2-3B-Instruct': 3.21,
        'HuggingFaceTB/SmolLM2-135M-Instruct': 0.135,
    }
    assert {name: weights_of(PUBLISHED[name]).stored / 1e9 for name in billions} == pytest.approx(billions, rel=0.01)


def test_a_conversation_of_the_paper_at_its_longest():
    (work,) = paper_work('sftuser-14b')
    assert work.layers() == {'user': 48, 'assistant': 36}
    # 5 turns from a given opening: 5 replies and 4 messages of the user, in contexts for one message more.
    messages = list(walk(work))
    assert [message.role for message in messages] == [ASSISTANT, USER] * 4 + [ASSISTANT]
    room = capacity(work.assistant.policy.spec, 1024, 2048, 5)
    assert 2048 + 5 * (2048 + 1024) < room <= 17920
    assert [message.cache for message in messages] == sorted(message.cache for message in messages)
    last = messages[-1]
    header = len(work.assistant.policy.spec.own_header)
    assert last.before[ASSISTANT] + header + 2048 + 1 <= last.cache <= room
    assert last.before[ASSISTANT] == 2048 + 4 * (2048 + 1 + 1024 + 1) + 8 * header


def test_the_programs_of_conversations_are_bounded():
    (work,), (paced,) = (paper_work('sftuser-14b', rows_in_flight=64, batching=x) for x in ('static', 'continuous'))
    both, apart = (absent_mesh(*shape) for shape in ((16, 4), (8, 8)))
    # Batches of 64, 32 and 16 rows; a message of the user has 8 sizes of caches, and one of the assistant 7.
    assert conversation_bound(work, both)['add_message'] == 3 * (8 + 7)
    # Both sides have 8 sizes, and windows are of three levels.
    assert conversation_bound(paced, both)['decode_block'] == 2 * 8 * 3
    assert conversation_bound(work, both, apart) == conversation_bound(paced, both, apart)
    (text,) = paper_work('rpuser3-qwen3-14b')
    assert conversation_bound(text, both) == {}


def test_a_simulator_that_passes_text_is_a_model_on_the_device():
    (text,) = paper_work('rpuser3-qwen3-14b')
    assert text.user is None
    assert text.layers() == {'user': 40, 'assistant': 36}
    assert {message.role for message in walk(text)} == {USER, ASSISTANT}
    assert 'user: its views' in step_limits(text, Group(CHIPS['v5p'], data=8, model=1))
    everyone = paper_work()  # sftuser2-14b is held out
    assert [work.name for work in everyone] == [name for name in paper.arms(text=False) if name != 'sftuser2-14b']


def test_roofline_of_a_step():
    (work,) = paper_work('sftuser-14b', rows_in_flight=64)
    chip = CHIPS['v5p']
    one, eight = (step_limits(work, Group(chip, data=data, model=1)) for data in (1, 8))
    weights = weights_of(work.assistant.policy.spec.config)
    # The weights are read once a token for each 64 rows, and each row's cache.
    sampling = eight['assistant: sampling']
    assert sampling.by == 'bandwidth'
    cached = sum(sum(range(m.before[ASSISTANT], m.before[ASSISTANT] + 2048)) for m in walk(work) if m.role == ASSISTANT)
    read = 5 * (5 * 2048 * 2 * (weights.layers + weights.head) + 8 * 2 * weights.cache * cached)
    assert sampling.seconds == pytest.approx(read / chip.bandwidth)
    tokens = work.capacity(ASSISTANT)
    products = 6 * weights.layers * tokens + 6 * weights.head * 5 * 2048 + 3 * weights.attention * tokens**2 / 2
    assert eight['gradients'].seconds == pytest.approx(40 * products / chip.flops, rel=1e-3)
    assert one['gradients'].seconds == pytest.approx(8 * eight['gradients'].seconds)
    assert eight['optimizer'].seconds == pytest.approx(4 * 32 * weights.stored / 8 / chip.bandwidth)
    program = Measured(
        'message/user',
        20,
        (),
        {'aliased': 0.0},
        {},
        {('', 'all-gather', ALL): Sent(1, 6e9), ('send/decode', 'all-reduce', OF_ROWS): Sent(2, 3e6)},
        0.0,
    )
    assert rounds_of(work, 'message/user', 'send/decode') == 1025
    assert rounds_of(work, 'message/user', 'receive/feed') == 8
    assert sent_seconds(work, program, chip) == pytest.approx(20 * (7 / 8 * 6e9 + 1025 * 3 / 4 * 2 * 3e6) / chip.links)


def checked_on(name, mesh, programs):
    (work,) = paper_work('sftuser-14b', rows_in_flight=64)
    data, model = mesh_shape(mesh)
    return Checked(work, topology_of(name), data, model, {x.name: x for x in programs}, {}, {}, work.layers(), [])


def program(name, calls, sent):
    return Measured(name, calls, (), {'aliased': 0.0}, {}, sent, 0.0)


def test_a_step_on_more_chips_by_hand():
    along = {('', 'all-gather', ALL): Sent(3, 7e9), ('', 'collective-permute', Peers(2, 8)): Sent(14, 7e8)}
    gradients = program('gradients', 40, along)
    talk = program('message/user', 20, {('send/decode', 'all-reduce', ALL): Sent(1, 4)})
    checked = checked_on('v5p:2x2x2', '8x1', [gradients, talk])
    first, last = (scaling.scaled(checked, chips) for chips in (8, 256))
    assert (first.rows, last.rows, first.data, last.data) == (320, 320 * 32, 8, 256)
    # Of 8 chips in a cube each has three neighbours; of 4 x 8 x 8, all whose sides are rings, six. Permutations take
    # two of the six links. Of 8 shards 7 are permuted, and of 256, each a 32nd, 255.
    links, calls, rounds = 600e9, 40, 20 * 1025
    gathered, permuted = calls * 7e9 + rounds * 2 * 4, calls * 7e8
    assert first.seconds['moving'] == pytest.approx((7 / 8 * gathered) / (links / 2) + permuted / (links / 3))
    larger = permuted / 7 * 255 / 32
    assert last.seconds['moving'] == pytest.approx((255 / 256 * gathered) / links + larger / (links / 3))
    # From corner to corner 3 links, and 17. Each other shard has a permutation: 7 have 14, 255 have 510.
    assert first.seconds['waiting'] == pytest.approx((calls * 3 + rounds) * 8e-6 + calls * 14 * 6e-6)
    assert last.seconds['waiting'] == pytest.approx((calls * 3 + rounds) * 22e-6 + calls * 510 * 6e-6)
    limits = step_limits(checked.work, Group(CHIPS['v5p'], 8, 1))
    assert first.seconds['sampling'] == last.seconds['sampling'] > 0
    spared = limits['optimizer'].seconds * (1 - 1 / 32)
    assert first.seconds['other computing'] - last.seconds['other computing'] == pytest.approx(spared)
    assert last.seconds['host'] == pytest.approx(32 * first.seconds['host'])
    assert scaling.efficiency(first, first) == 1
    assert scaling.efficiency(last, first) == pytest.approx(first.total / last.total)
    text = '\n'.join(scaling.scaling_text(checked, [8, 256]))
    assert 'Seconds of a step with 40 conversations a chip:' in text
    assert '| 256 (4x8x8) | 256x1 | 10,240 |' in text
    assert 'First to break: ' in text
    assert 'minibatches of 80 rows go over data=16 at most (with microbatches=10 over 8), which is 16 chips' in text


def test_devices_with_the_same_rows_wait_for_each_other_alone():
    talk = program('message/user', 20, {('send/decode', 'all-reduce', OF_ROWS): Sent(2, 4)})
    step = program('step', 4, {('', 'collective-permute', Peers(2, 4)): Sent(3, 1e9)})
    checked = checked_on('v5e:8x8', '16x4', [talk, step])
    for chips in (8, 64, 256):  # four neighbours stay four, with one of the four links of each
        seconds = scaling.scaled(checked, chips).seconds
        assert seconds['waiting'] == pytest.approx(20 * 1025 * 2 * 8e-6 + 4 * 3 * 6e-6)
        assert seconds['moving'] == pytest.approx((20 * 1025 * 2 * 4 * 3 / 4 + 4 * 1e9) / (200e9 / 4))
    assert scaling.rings('v5e', (8, 16)) == pytest.approx(3 / 4)
    assert scaling.line('v5e', (16, 16), 16) == pytest.approx(1 / 2)
    assert scaling.rings('v5p', (4, 4, 2)) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ('chips', 'mesh', 'message'),
    [
        ('9', (8, 1), "--chips: expected numbers of chips of v5p:2x2x2: 8, 16, 32, 64, 128, 256; found '9'"),
        ('8', (1, 8), "--chips: expected numbers of chips of v5p:2x2x2: 16, 32, 64, 128, 256; found '8'"),
        ('16', (1, 8), '--chips: expected a mesh with data above 1, whose collectives grow, found 1x8'),
    ],
)
def test_impossible_numbers_of_chips_are_one_line(chips, mesh, message):
    with pytest.raises(ConfigError, match=f'^{re.escape(message)}$'):
        scaling.check_chips(topology_of('v5p:2x2x2'), absent_mesh(*mesh), [chips])


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v9:2x2', "expected a topology such as v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8, found 'v9:2x2'"),
        ('v5p:2x2', "expected a shape such as v5p:2x2x2, found 'v5p:2x2'"),
        ('v5e:0x4', "expected a shape such as v5e:4x4, found 'v5e:0x4'"),
        ('cpu', "expected a shape such as cpu:8, found 'cpu'"),
    ],
)
def test_an_unknown_topology_is_one_line(name, message):
    with pytest.raises(ConfigError, match=f'^--topology: {re.escape(message)}$'):
        topology_of(name)


def test_a_topology_without_its_library_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name))
    with pytest.raises(ConfigError, match=r"v5e:4x4 needs libtpu, found none installed; pip install '\.\[tpu\]'"):
        machines.prepare_process([topology_of('v5e:4x4')])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'layers': 0}, '--layers: expected at least 1, found 0'),
        ({'programs': ['turn']}, "--programs: expected some of start, message/user, .*, found 'turn'"),
        ({'mesh': '8'}, "--mesh: expected DATAxMODEL, for instance 8x1, found '8'"),
        ({'mesh': '3x1'}, '--mesh: expected data x model = 1 devices of cpu:1, found 3x1'),
    ],
)
def test_bad_flags_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr('tools.compile_check.__main__.prepare_process', lambda topologies: None)
    usual = {'names': ['cpu:1'], 'mesh': None, 'layers': None, 'programs': ['step']}
    with pytest.raises(ConfigError, match=f'^{message}$'):
        compile_all(paper.get_config('sftuser-14b'), **usual | arguments)


@pytest.mark.parametrize(
    ('mesh', 'message'),
    [
        ('1x3', r'--mesh: mesh\.model: expected a divisor of .*, found 3 \(user of arm sftuser-14b\)'),
        ('1x32', r'--mesh: mesh\.model: expected a divisor of num_heads=40, .* found 32 .*'),
        ('16x1', r'config\.rl.* / \(minibatches x microbatches\): expected a multiple of mesh\.data=16, found 8 rows'),
        ('128x1', r'config\.rl\.prompts_per_step x samples_per_prompt: .* mesh\.data=128, found 320 rows'),
    ],
)
def test_a_mesh_that_divides_neither_heads_nor_rows_is_one_line(mesh, message):
    (work,) = paper_work('sftuser-14b')
    with pytest.raises(ConfigError, match=f'^{message}$'):
        check_mesh(work, absent_mesh(*mesh_shape(mesh)))


def test_a_model_of_unknown_sizes_is_one_line():
    config = paper.get_config('sftuser-14b').to_dict()
    config['model']['source'] = 'nobody/knows'
    with pytest.raises(ConfigError, match=r"^config\.model\.source: expected a folder, .*, found 'nobody/knows'; "):
        next(works_of(settings_of(config)))


SIZES = {
    'model_dim': 16,
    'num_layers': 1,
    'num_heads': 2,
    'num_kv_heads': 2,
    'head_dim': 8,
    'mlp_dim': 32,
}
TINY = """
from configs import paper


def get_config(arg=''):
    config = paper.get_config('sftuser-7b')
    sizes = {'model_dim': 16, 'num_heads': 2, 'num_kv_heads': 2, 'mlp_dim': 32, 'max_positions': 256}
    config.model.random.update(sizes | {'num_layers': %d, 'tied_embedding': True, 'seed': 0})
    config.arms['sftuser-7b'].model.random.update(sizes | {'num_layers': %d, 'tied_embedding': False, 'seed': 0})
    config.conversation.limits.update(turns=2, prompt_tokens=16, assistant_tokens=8, user_tokens=8)
    config.conversation.reserved_prompt_tokens = 8
    config.rl.update(prompts_per_step=2, samples_per_prompt=4, row_buckets=(32,))
    config.rl.algorithm.update(minibatches=2, microbatches=2)
    config.compute.rows_in_flight = 4
    return config
"""


def numbers(tmp_path, *flags, layers=(1, 1), topology='cpu:2'):
    """What the program prints for a tiny config, and its numbers."""
    file, output = tmp_path / 'tiny.py', tmp_path / 'numbers.json'
    file.write_text(TINY % layers)
    command = [sys.executable, '-m', 'tools.compile_check', f'--config={file}', f'--topology={topology}']
    done = subprocess.run(
        [*command, f'--output={output}', *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(output.read_text())
    return done.stdout, found


def sent(program, scope=''):
    """Bytes of a program's collectives by kind."""
    sizes = collections.Counter()
    for found in program['collectives']:
        sizes[found['kind']] += found['size'] if found['scope'] == scope else 0
    return sizes


def test_a_tiny_config_is_compiled_for_two_devices(tmp_path):
    text, found = numbers(tmp_path, '--programs=passes,step')
    assert '## sftuser-7b on cpu:2 as 2x1' in text
    assert re.search(r'\n\| passes \| 4 \| 0\.0', text)
    assert 'lengths of rows: 3 programs (passes 2), ' in text  # up to 32 tokens, and up to all
    passes, step = (found['programs'][name] for name in ('passes', 'step'))
    assert (passes['calls'], step['calls']) == (4, 2)
    assert sent(passes)['all-gather'] > 0  # of parameters, which are split over `data`
    assert sent(step)['all-reduce'] < 1000  # norms
    # By arithmetic and by the compiler: parameters and two moments, in place of which their successors come, and the
    # gradient. A device keeps its half.
    stored = weights_of(dataclasses.replace(PUBLISHED['Qwen/Qwen2.5-3B-Instruct'], **SIZES)).stored
    kept = found['kept']
    assert kept['parameters'] == pytest.approx(4 * stored / 2, rel=0.01)
    assert kept['parameters'] + kept['optimizer'] == pytest.approx(step['bytes']['aliased'], rel=1e-4)
    assert step['bytes']['arguments'] == pytest.approx(step['bytes']['aliased'] + kept['parameters'], rel=0.01)
    assert found['fits'] is None
    needed = step['bytes']['arguments'] + step['bytes']['temporaries'] + kept['reference'] + kept['simulator']
    assert step['needs'] == pytest.approx(needed, rel=0.01)


@pytest.mark.long
def test_sides_of_continuous_batching_are_compiled_apart(tmp_path):
    _, found = numbers(tmp_path, '--programs=block/user,feed/assistant', '--config.compute.batching=continuous')
    assert set(found['programs']) == {'block/user', 'feed/assistant'}
    user, assistant = (found['programs'][name] for name in ('block/user', 'feed/assistant'))
    # 2 messages of up to 8 tokens, one block each, by windows of one row of the two that a device has in flight.
    assert user['calls'] == 2 * 1 * 2
    # Beside it are what a step keeps, and the assistant: parameters, and caches of two rows and of one that enters.
    sizes, kept, passing = user['bytes'], found['kept'], found['passing']
    peak = sum(sizes.values()) - 2 * sizes['aliased']
    others = user['needs'] - peak - sum(size for kind, size in kept.items() if kind != 'simulator')
    caches, cache = others - passing['parameters to sample'], passing["the assistant's cache"]
    assert cache <= caches <= 2 * cache
    assert assistant['bytes']['aliased'] > 0  # caches are written in place


@pytest.mark.long
def test_a_simulator_with_a_mesh_of_its_own_is_compiled_for_it(tmp_path):
    flags = ('--config.compute.simulator_mesh.data=1', '--config.compute.simulator_mesh.model=2')
    programs = ('--programs=block/user,block/assistant,feed/user',)
    text, found = numbers(tmp_path, *programs, *flags)
    assert '## sftuser-7b on cpu:2 as 2x1, simulator 1x2' in text
    assert found['simulator_mesh'] == [1, 2]
    same = numbers(tmp_path, *programs, '--config.compute.batching=continuous')[1]
    # The simulator's weights and heads are split in two, and not the rows: that is as many bytes of caches.
    assert found['kept']['simulator'] == pytest.approx(same['kept']['simulator'] / 2, rel=0.1)
    assert found['passing'] == same['passing']
    assert {x['kind'] for x in found['programs']['block/user']['collectives']} >= {'all-reduce'}
    sizes, before = (x['programs']['block/user']['bytes']['arguments'] for x in (found, same))
    assert sizes < before
    of_assistant = [x['programs']['block/assistant']['bytes']['arguments'] for x in (found, same)]
    assert of_assistant[0] == pytest.approx(of_assistant[1], rel=0.01)


@pytest.mark.long
def test_few_layers_tell_of_all(tmp_path):
    """Every program on four devices: bytes of arguments, operations and collectives of few layers, continued."""
    whole = numbers(tmp_path, '--mesh=2x2', layers=(4, 6), topology='cpu:4')[1]
    few = numbers(tmp_path, '--mesh=2x2', '--layers=1', layers=(4, 6), topology='cpu:4')[1]
    assert few['compiled_layers'] == [
        {'user': 1, 'assistant': 1},
        {'user': 2, 'assistant': 1},
        {'user': 1, 'assistant': 2},
    ]
    assert list(few['programs']) == list(whole['programs'])
    for name, program in whole['programs'].items():
        guessed = few['programs'][name]
        assert guessed['bytes']['arguments'] == pytest.approx(program['bytes']['arguments'], rel=1e-6), name
        assert guessed['operations'] == pytest.approx(program['operations']), name
        # Which temporary arrays share memory is the compiler's to find, and not linear, least of all with one layer.
        assert guessed['bytes']['temporaries'] == pytest.approx(program['bytes']['temporaries'], rel=0.5), name


LAYOUTS = """
from tools.compile_check import machines

slices = [machines.topology_of(name) for name in ('v5e:8x8', 'v6e:8x8')]
machines.prepare_process(slices)
for shape in ((16, 4), (8, 8), (4, 16)):
    one, other = ([tuple(x.coords) for x in machines.mesh_of(topology, shape).devices.flat] for topology in slices)
    assert one == other and len(set(one)) == 64, shape
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_slices_of_v6e_have_the_meshes_of_v5e():
    done = subprocess.run([sys.executable, '-c', LAYOUTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tiny_config_is_compiled_for_a_tpu(tmp_path):
    text, found = numbers(tmp_path, '--mesh=2x2', topology='v5e:2x2')
    assert found['fits']
    assert 'smallest slice that fits: v5e:2x2 as 2x2' in text
    assert set(found['programs']) == {'passes', 'gradients', 'step', 'start', 'message/user', 'message/assistant'}
    assert found['least_seconds']['gradients'] > 0
