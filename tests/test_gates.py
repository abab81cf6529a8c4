"""gates.py: every gate passing and failing, the ablation by hand, the verdict on disk, and the exit status."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import run_here
from PIL import Image
from test_common import refusal

import gates
from gates import Gate, ablation, at_least, at_most, conclude, curves, exactly, require_passed

GOOD = at_most('text loss', 0.5, 1)
BAD = at_least('share answered', 0.25, 0.75)


def verdicts(gates):
    return [gate.passed for gate in gates]


@pytest.mark.parametrize('gate, bar, right, wrong', [
    (at_most, '<= 0.5', 0.5, 0.51), (at_least, '>= 0.5', 0.5, 0.49), (exactly, '= 0.5', 0.5, 0.51)])
def test_a_gate_passes_on_its_own_side_of_the_bar_and_nan_fails(gate, bar, right, wrong):
    for value in right, np.float32(right), torch.tensor(right):
        assert gate('name', value, 0.5) == ('name', 0.5, bar, True)
    assert gate('name', wrong, 0.5).passed is False
    assert gate('name', math.nan, 0.5).passed is False


# -----------------------------------------------------------------------------
# ablation


def test_the_difference_is_token_weighted_and_not_a_mean_of_means():
    # 5 short items lose 2 nats on 1 label, 5 long ones 1 nat on 9: 15 nats / 50 labels = 0.3; the mean of means is 1.06
    gate, measured = ablation('a', [1.0, 10.0] * 5, [3.0, 11.0] * 5, counts=[1, 9] * 5, bar=0.1, min_win=0.9)
    # k short items of 10 drawn: (10 + k) / (90 - 8k). k <= 1 and k >= 9 have 1.1 % each, k = 2 and k = 8 have 4.4 %
    assert measured == pytest.approx({'d': 0.3, 'low': 12 / 74, 'high': 18 / 26, 'win': 1.0})
    assert gate.passed and gate.value == 0.3


def test_the_interval_is_over_items_drawn_anew():
    # 9 items lose nothing, one loses 10 nats. It is not drawn in 0.9^10 = 35 % of the samples: low 0. It is drawn up to
    # 3 times in 98.7 % of them and up to 2 times in 93.0 %: high 3 * 10 / 10 = 3
    gate, measured = ablation('a', [0.0] * 10, [0.0] * 9 + [10.0], counts=[1] * 10, bar=0.0, min_win=0.0)
    assert measured == {'d': 1.0, 'low': 0.0, 'high': 3.0, 'win': 0.1} and not gate.passed
    assert gate.bar == '95 % interval above 0; [0.000, 3.000], win 0.100 >= 0'


@pytest.mark.parametrize('bar, passed', [(0.49, True), (0.5, False), (-1.0, True)])
def test_the_interval_has_to_lie_above_the_bar(bar, passed):
    # every item: 0.5 nats per label
    gate, measured = ablation('a', [0.0] * 8, [1.0] * 8, counts=[2] * 8, bar=bar, min_win=0.5)
    assert gate.passed is passed and measured == {'d': 0.5, 'low': 0.5, 'high': 0.5, 'win': 1.0}


@pytest.mark.parametrize('min_win, passed', [(0.0, True), (0.9, True), (0.91, False)])
def test_the_share_of_items_that_win_has_its_own_bar(min_win, passed):
    gate, measured = ablation('a', [0.0] * 10, [5.0] * 9 + [-0.1], counts=[1] * 10, bar=0.0, min_win=min_win)
    assert gate.passed is passed and measured['win'] == 0.9 and measured['low'] > 0
    assert gate.bar.endswith(f'win 0.900 >= {min_win:g}')


def test_seven_items_are_too_few_and_eight_will_do():
    too_few, enough = (ablation('a', [0.0] * n, [1.0] * n, counts=[1] * n, bar=0.1, min_win=0.5)[0] for n in (7, 8))
    assert not too_few.passed and '7 items' in too_few.bar and enough.passed


@pytest.mark.parametrize('better, worse, counts', [
    ([], [], []), ([0.0] * 9, [1.0] * 9, [0] * 9), ([math.nan] + [0.0] * 8, [1.0] * 9, [1] * 9),
    ([0.0] * 9, [1.0] * 8 + [math.nan], [1] * 9)])
def test_no_items_no_labels_and_nan_fail(better, worse, counts):
    gate, measured = ablation('a', better, worse, counts=counts, bar=-5.0, min_win=0.0)
    assert gate.passed is False and math.isnan(gate.value) and math.isnan(measured['low'])


# -----------------------------------------------------------------------------
# what a stage did


@pytest.mark.parametrize('key, change, fails', [
    ('psnr', -0.49, False), ('psnr', -0.51, True), ('log_mel', 0.019, False), ('log_mel', 0.021, True),
    ('psnr', np.nan, True)])
def test_how_much_worse_is_a_regression(key, change, fails):
    baseline = {'psnr': 30.0, 'log_mel': 0.4, 'items': 'x'}
    slack = {'psnr': -0.5, 'log_mel': 0.05, 'ssim': -0.02}     # of ssim the baseline says nothing
    found = gates.no_regression({**baseline, key: baseline[key] + change}, baseline, same={'items': 'x'}, slack=slack)
    failed = [gate.name for gate in found if not gate.passed]
    assert len(found) == 3 and failed == ([f'{key} against the baseline'] if fails else [])


def test_a_baseline_of_other_items_cannot_be_compared_with():
    [gate] = gates.no_regression({}, {'items': 'x'}, same={'items': 'y'}, slack={})
    assert not gate.passed and 'items is not that of the baseline' in gate.name


@pytest.mark.parametrize('change, values', [
    ({}, [0, 0, 0]),
    ({'trainable': {'a', 'b', 'c'}, 'with_gradient': {'a', 'b', 'c'}}, [1, 0, 0]),    # c is trained and not declared
    ({'trainable': {'a'}, 'with_gradient': {'a'}}, [1, 0, 0]),                        # b is not trained
    ({'with_gradient': {'b'}}, [0, 1, 0]),
    ({'after': 'f1'}, [0, 0, 1])])
def test_what_was_trained_is_what_was_declared_with_gradients_and_nothing_else_moved(change, values):
    names = dict.fromkeys(('declared', 'trainable', 'with_gradient'), {'a', 'b'})
    found = gates.training_gates(**{**names, 'before': 'f0', 'after': 'f0', **change})
    assert [gate.value for gate in found] == values and verdicts(found) == [value == 0 for value in values]


def test_cut_examples_and_ones_without_a_label_are_counted():
    assert verdicts(gates.label_gates(2, 1, 0, 0.5)) == [True, True]
    assert verdicts(gates.label_gates(2, 1, 1, 0.4)) == [False, False]
    assert verdicts(gates.label_gates(0, 0, 0, 1.0)) == [False, False]


def test_a_run_that_data_or_settings_doom_ends_with_one_line_or_is_told_to_go_on(capsys):
    doomed = gates.label_gates(8, 2, 1, 0.01)
    for allow, cure in (None, 'or leave these samples out'), (False, 'allow_failed_gates = True to train all the same'):
        message = refusal(gates.end_doomed, doomed, allow)
        assert '"share of truncated samples": 0.25, wanted <= 0.01; "samples without a label": 1, wanted' in message
        assert message.endswith(cure)
    gates.end_doomed(doomed, allow_failed_gates=True)
    assert 'it goes on' in capsys.readouterr().out
    for allow in None, False, True:
        gates.end_doomed(gates.label_gates(8, 0, 0, 0.01), allow)
    assert capsys.readouterr().out == ''
    assert '"samples without a label": nan' in refusal(gates.end_doomed, gates.label_gates(0, 0, 0, 1.0))   # no samples


def test_lora_outside_the_language_models_layers_fails():
    inside = 'llm.model.layers.0.self_attn.q_proj.lora_A.weight'
    assert gates.lora_gate([inside, 'tower.layers.0.q_proj.weight']).passed
    assert not gates.lora_gate([inside, 'tower.layers.0.q_proj.lora_A.weight']).passed


@pytest.mark.parametrize('wrong, n_failed', [
    ({}, 0), ({'n_wrong_shards': 1}, 1), ({'n_wrong_decodes': 1}, 1), ({'n_mismatches': 1}, 1),
    ({'n_unlabelled': 1}, 1), ({'n_truncated': 1}, 1), ({'ids': {'train': ['a', 'a']}}, 1),
    ({'media': {'train': ['x'], 'eval': ['x']}}, 1),
    # what was not looked at has not passed
    ({'n_shards': 0}, 1), ({'ids': {}}, 1), ({'media': {}}, 1), ({'n_checked': 0}, 2), ({'n_examples': 0}, 2)])
def test_one_wrong_thing_in_the_shards_fails_its_gate(wrong, n_failed):
    right = {
        'n_shards': 2, 'n_wrong_shards': 0, 'ids': {'train': ['a'], 'eval': ['b']},
        'media': {'train': ['x'], 'eval': ['y']}, 'n_checked': 2, 'n_wrong_decodes': 0, 'n_mismatches': 0,
        'n_examples': 4, 'n_unlabelled': 0, 'n_truncated': 0}
    assert verdicts(gates.shard_gates(**{**right, **wrong})).count(False) == n_failed


def test_one_id_outside_its_range_or_one_golden_item_of_another_shape_fails():
    first = np.array([4, 8])
    end = np.array([8, 12])
    shapes = [(3, 2, 2)] * 2
    good = [np.zeros((3, 2, 2), np.uint8)] * 2

    def found(codes, golden, shapes=shapes):
        named = {'first': first, 'end': end, 'golden': golden, 'shapes': shapes, 'n_golden': 2}
        return verdicts(gates.generation_gates('t2i', codes, **named))
    legal = [[4, 11], [7, 8]]
    assert found(legal, good) == [True, True]
    assert found([[4, 12], [7, 8]], good) == [False, True]
    assert found(legal, good[:1]) == [True, False]
    assert found(legal, [np.zeros((3, 2, 2)), np.full((3, 2, 2), np.nan)]) == [True, False]
    assert found(legal, good, [(3, 2, 2), (3, 4, 4)]) == [True, False]
    assert found([], []) == [False, False]


def test_a_model_that_generates_nothing_or_noise_or_the_same_thing_has_collapsed():
    rng = np.random.default_rng(0)
    t = np.arange(4000) / 16000
    codes = [[n] for n in range(8)]
    pictures = [rng.integers(0, 255, (3, 8, 8)) for _ in codes]
    tones = [0.3 * np.sin(2 * np.pi * (200 + 10 * n) * t) for n in range(8)]

    def of_pictures(codes, pictures):
        return verdicts(gates.collapse_gates('t2i', codes, pictures, distinct=0.5, pixel_std=10.0))

    def of_sounds(codes, waves):
        return verdicts(gates.collapse_gates('t2a', codes, waves, distinct=0.5, rms=0.01, spectral_std=6.0))
    assert of_pictures(codes, pictures) == [True, True]
    assert of_pictures([[1]] * 8, pictures) == [False, True]
    assert of_pictures(codes[:7], pictures[:7]) == [False, True]       # too few: of one, all are distinct
    assert of_pictures(codes, [np.full((3, 8, 8), 7)] * 8) == [True, False]
    assert of_sounds(codes, tones) == [True, True, True]
    assert of_sounds(codes, [0 * t] * 8) == [True, False, False]
    assert of_sounds(codes, [rng.normal(size=4000)] * 8) == [True, True, False]
    assert of_sounds(codes, [t * np.nan] * 8) == [True, False, False]
    assert of_sounds([], []) == [False] * 3


# -----------------------------------------------------------------------------
# the verdict


def test_concluding_writes_the_verdicts_and_names_what_failed(tmp_path, capsys):
    out_dir = tmp_path / 'new'
    assert conclude(out_dir, [GOOD, BAD, at_least('b', 1, 2)], losses={'correct': 1.5}) == 1
    assert json.loads((out_dir / 'gates.json').read_text()) == {'passed': False, 'gates': [
        {'name': 'text loss', 'value': 0.5, 'bar': '<= 1', 'passed': True},
        {'name': 'share answered', 'value': 0.25, 'bar': '>= 0.75', 'passed': False},
        {'name': 'b', 'value': 1, 'bar': '>= 2', 'passed': False}], 'losses': {'correct': 1.5}}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ['pass', 'FAIL', 'FAIL']
    assert lines[3] == f'{out_dir}: FAILED at: share answered; b'


@pytest.mark.parametrize('gates_found, status, last_line', [
    ([GOOD, GOOD], 0, '2 gates passed'), ([], 1, 'FAILED at: no gate was measured')])
def test_the_exit_status_is_0_when_there_are_gates_and_all_passed(gates_found, status, last_line, tmp_path, capsys):
    assert conclude(tmp_path, gates_found) == status
    assert json.loads((tmp_path / 'gates.json').read_text())['passed'] is (status == 0)
    assert capsys.readouterr().out.splitlines()[-1] == f'{tmp_path}: {last_line}'


def test_a_value_that_is_no_number_is_null_in_gates_json_and_has_not_passed(tmp_path):
    worth = {'': dict.fromkeys(gates.WORTH, math.nan)}
    conclude(tmp_path, [GOOD, at_least('rms', math.nan, 1)], worth=worth, losses={'correct': np.float64('inf')})

    def no_constant(name):
        raise AssertionError(f'{name} is not JSON')
    record = json.loads((tmp_path / 'gates.json').read_text(), parse_constant=no_constant)
    assert record['gates'][1]['value'] is None and record['losses'] == {'correct': None}
    verdicts, passed = gates.read_verdict(tmp_path / 'gates.json')
    assert not passed and verdicts[0] == GOOD and math.isnan(verdicts[1].value) and verdicts[1].name == 'rms'
    assert math.isnan(gates.read_worth(tmp_path / 'gates.json')['']['different'])
    assert refusal(require_passed, tmp_path, False).startswith(f'{tmp_path} failed its gate "rms"')


def test_a_stage_takes_only_an_input_whose_gates_passed(tmp_path):
    def refused():
        assert require_passed(tmp_path, True) is None
        return refusal(require_passed, tmp_path, False)
    then = '; fix it, or set allow_failed_gates = True to go on all the same'
    assert refused() == f'{tmp_path} has no gates.json: its stage did not finish{then}'
    conclude(tmp_path, [GOOD, BAD])
    assert refused() == f'{tmp_path} failed its gate "share answered"{then}'
    conclude(tmp_path, [BAD, GOOD, BAD])
    assert refused() == f'{tmp_path} failed its gate "share answered" and 1 more{then}'
    conclude(tmp_path, [])
    assert refused() == f'{tmp_path} failed: no gate was measured{then}'
    for damaged in '{"passed": tr', '[]', 'null', '{"gates": [1], "passed": true}', '[' * 100_000:
        (tmp_path / 'gates.json').write_text(damaged)
        assert refused() == f'{tmp_path} failed its gate "gates.json is whole"{then}'
    conclude(tmp_path, [GOOD])
    assert require_passed(tmp_path, False) is None
    assert refusal(require_passed, tmp_path / 'gone', True) == (
        f'{tmp_path}/gone: no such folder; run the stage that writes it first')


# -----------------------------------------------------------------------------
# the report card and the curves


def test_the_report_card_is_the_exit_status(tmp_path):
    conclude(tmp_path / 'a1', [GOOD])
    conclude(tmp_path / 'b3', [GOOD, GOOD])
    assert run_here('gates.py', tmp_path)[0] == 0
    conclude(tmp_path / 'b3', [GOOD, BAD])
    status, printed = run_here('gates.py', tmp_path)
    assert status == 1
    assert printed.startswith(f'{tmp_path}/a1\n{gates.table([GOOD])}\n\n{tmp_path}/b3\n{gates.table([GOOD, BAD])}\n\n')
    assert run_here('gates.py', tmp_path / 'a1')[0] == 0 and run_here('gates.py', tmp_path / 'b3')[0] == 1
    assert (tmp_path / 'report.html').exists()


def test_what_the_stages_are_worth_stands_first(tmp_path):
    crossed = np.full((1, 8, 8), 4.0) - 3 * np.eye(8)
    worth = gates.worth(0.75, crossed, distinct=0.5)
    assert worth == {'share removed': 0.75, 'input found': 1.0, 'output found': 1.0, 'different': 0.5}
    conclude(tmp_path / 'a1', [GOOD], worth={'': worth})
    conclude(tmp_path / 'b3', [GOOD], worth={'i2t': worth, 'a2t': {**worth, 'input found': 0.25}})
    conclude(tmp_path / 'b4', [GOOD])                  # of an older version
    (tmp_path / 'b5').mkdir()
    (tmp_path / 'b5' / 'gates.json').write_text('{"worth": [1]}')
    _, printed = run_here('gates.py', tmp_path)
    head, *rows = printed.split('\n\n')[0].splitlines()
    assert head.split() == ' '.join(gates.WORTH).split()
    assert [row.split() for row in rows] == [
        [f'{tmp_path}/a1', '0.750', '1.000', '1.000', '0.500'],
        [f'{tmp_path}/b3', 'i2t', '0.750', '1.000', '1.000', '0.500'],
        [f'{tmp_path}/b3', 'a2t', '0.750', '0.250', '1.000', '0.500']]


def test_the_report_card_of_nothing_fails_with_a_message(tmp_path):
    (tmp_path / 'a1').mkdir()
    for folder in tmp_path, tmp_path / 'gone':
        assert run_here('gates.py', folder)[0] == f'{folder}: no gates.json here or one level below; run a stage first'
    assert run_here('gates.py')[0] == gates.__doc__.strip()


def test_the_table_has_a_line_for_each_gate():
    assert gates.table([GOOD, Gate('n', 2, '= 3', False)]) == ('pass  text loss      0.5000  <= 1\n'
                                                               'FAIL  n              2.0000  = 3')


def test_the_curves_of_a_log_are_a_picture_that_follows_the_log(tmp_path):
    losses = dict.fromkeys(('noise', 'zero', 'shuffled', 'correct', 'input_recall_1', 'output_recall_1'), 0.5)
    pictures = []
    for loss in 3.0, 1.0:
        records = [{'kind': 'run', 'stage': 'a1'}, {'kind': 'step', 'step': 1, 'window_loss': 4.0},
                   {'kind': 'step', 'step': 2, 'window_loss': loss}, {'kind': 'eval', 'step': 2, **losses}]
        (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
        curves(tmp_path / 'log.jsonl', tmp_path / 'curves.png')
        with Image.open(tmp_path / 'curves.png') as picture:
            assert (picture.format, picture.size) == ('PNG', (1650, 440))    # 15 x 4 inches at 110 dots
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]
