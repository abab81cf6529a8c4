"""The token space and its grammar: ranges, hashes, refusals, documents worked out by hand."""
import json

import numpy as np
import pytest

from uti import Grammar, TokenSpace

BASE = {'name': 'tiny', 'text_rows': 100, 'tokenizer_sha256': 'ab', 'end_of_text': 99}
IMAGE = {'class': 'X', 'settings': {}, 'sha256': 'cd', 'size': 4, 'grid': (2, 2), 'codes': 16}
AUDIO = {'class': 'Y', 'settings': {}, 'sha256': 'ef', 'sample_rate': 8, 'samples': 8, 'frames': 2, 'codebooks': 2,
         'codes': 8}
SPACE = TokenSpace(BASE, IMAGE, AUDIO)
GRAMMAR = Grammar(SPACE)


def test_ranges_follow_one_another_from_the_last_text_row():
    assert [(r.name, r.first, r.end) for r in SPACE.ranges] == [
        ('text', 0, 100), ('special', 100, 104), ('image', 104, 120), ('audio_0', 120, 128), ('audio_1', 128, 136)]
    assert SPACE.total == 136 and SPACE.n_new == 36 and SPACE.special['<|aud_end|>'] == 103


def test_the_hash_is_the_same_on_every_machine_and_for_every_version_of_this_code():
    assert SPACE.sha256.startswith('fade1b309fb74dbe')


def test_a_saved_space_is_the_same_and_a_changed_file_is_refused(tmp_path):
    path = tmp_path / 'token_space.json'
    SPACE.save(path)
    assert TokenSpace.load(path).sha256 == SPACE.sha256
    path.write_text(path.read_text().replace('"codes": 16', '"codes": 17'))
    with pytest.raises(SystemExit, match='its sha256 is not that of its content'):
        TokenSpace.load(path)
    with pytest.raises(SystemExit, match='no token space here'):
        TokenSpace.load(tmp_path / 'none.json')
    path.write_text(json.dumps({'base': 1}))
    with pytest.raises(SystemExit, match='not a token space'):
        TokenSpace.load(path)


def test_another_space_is_refused_by_the_first_field_that_differs():
    SPACE.require(TokenSpace(BASE, {**IMAGE, 'grid': [2, 2]}, AUDIO), 'shards')     # a list, as a file has it
    other = TokenSpace(BASE, {**IMAGE, 'sha256': 'xx'}, AUDIO)
    with pytest.raises(SystemExit, match="shards has another token space: image.sha256 is 'xx' there and 'cd' here"):
        SPACE.require(other, 'shards')


@pytest.mark.parametrize('ids, wrong', [
    ([104, 120], 'id 120 at position 1'), ([103], 'id 103 at position 0'), ([104, -1, 200], 'id -1 at position 1')])
def test_an_id_outside_its_range_is_named_with_its_position(ids, wrong):
    with pytest.raises(SystemExit, match=wrong + r' is outside image \[104, 120\)'):
        SPACE.check(ids, 'image')


@pytest.mark.parametrize('task, payload, ids, label_positions, label_ranges', [
    ('i2t', [104, 105, 106, 119], [100, 104, 105, 106, 119, 101, 7, 8, 99], [6, 7, 8], [0, 0, 0]),
    ('t2a', [120, 128, 127, 135], [7, 8, 102, 120, 128, 127, 135, 103], [3, 4, 5, 6, 7], [3, 4, 3, 4, 1]),
    ('text', None, [7, 8, 99], [1, 2], [0, 0])])
def test_documents_by_hand(task, payload, ids, label_positions, label_ranges):
    document = GRAMMAR.document(task, payload, [7, 8])
    assert document.ids.tolist() == ids
    assert document.label_positions.tolist() == label_positions
    assert document.label_ranges.tolist() == label_ranges


@pytest.mark.parametrize('task, modality', [('i2t', 'image'), ('t2i', 'image'), ('a2t', 'audio'), ('t2a', 'audio')])
def test_every_label_is_inside_its_range(task, modality):
    rng = np.random.default_rng(0)
    first, end = GRAMMAR.bounds(GRAMMAR.payload_ranges[modality])
    document = GRAMMAR.document(task, rng.integers(first, end), rng.integers(0, 99, 5))
    first, end = GRAMMAR.bounds(document.label_ranges)
    labels = document.ids[document.label_positions]
    assert (labels >= first).all() and (labels < end).all() and len(labels) == len(document.label_ranges)


@pytest.mark.parametrize('codes, message', [
    ([120, 128, 127], r'\(3,\) codes, wanted \(4,\) of one audio'),
    ([128, 120, 127, 135], r'id 128 at position 0 is outside audio_0 \[120, 128\)'),
    ([120, 128, 127, 136], r'id 136 at position 3 is outside audio_1 \[128, 136\)')])
def test_a_payload_out_of_its_cycle_is_refused(codes, message):
    with pytest.raises(SystemExit, match=message):
        GRAMMAR.document('t2a', codes, [1])


def test_a_space_without_a_modality_refuses_its_documents():
    with pytest.raises(SystemExit, match='this token space has no audio: wanted one of image'):
        Grammar(TokenSpace(BASE, IMAGE)).length('audio')
