"""gates.py: every gate passing and failing, the ablation by hand, the verdict on disk, and the exit status."""
import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

import gates
from gates import Gate, ablation, at_least, at_most, conclude, curves, exactly, require_passed, trained_set

GOOD, BAD = at_most('text loss', 0.5, 1), at_least('share answered', 0.25, 0.75)


@pytest.mark.parametrize('gate, value, bar, passed', [
    (at_most, 0.5, 0.5, True), (at_most, 0.51, 0.5, False), (at_most, math.nan, 0.5, False),
    (at_least, 0.5, 0.5, True), (at_least, 0.49, 0.5, False), (at_least, math.nan, 0.5, False),
    (exactly, 3, 3, True), (exactly, 4, 3, False), (exactly, math.nan, 3, False)])
def test_a_gate_passes_on_its_own_side_of_the_bar_and_nan_fails(gate, value, bar, passed):
    verdict = gate('name', value, bar)
    assert verdict.passed is passed and verdict.name == 'name'
    assert verdict.bar == {at_most: '<= 0.5', at_least: '>= 0.5', exactly: '= 3'}[gate]


# -----------------------------------------------------------------------------
# ablation


def test_the_difference_is_token_weighted_and_not_a_mean_of_means():
    # 5 short items lose 2 nats on 1 label, 5 long ones 1 nat on 9: 15 nats / 50 labels = 0.3; the mean of means is 1.06
    better, worse, counts = [1.0, 10.0] * 5, [3.0, 11.0] * 5, [1, 9] * 5
    gate, measured = ablation('a', better, worse, counts)
    # k short items of 10 drawn: (10 + k) / (90 - 8k). k <= 1 and k >= 9 have 1.1 % each, k = 2 and k = 8 have 4.4 %
    assert measured == {'d': 0.3, 'low': round(12 / 74, 5), 'high': round(18 / 26, 5), 'win': 1.0}
    assert gate.passed and gate.value == 0.3


def test_the_interval_is_over_items_drawn_anew():
    # 9 items lose nothing, one loses 10 nats. It is not drawn in 0.9^10 = 35 % of the samples: low 0. It is drawn up to
    # 3 times in 98.7 % of them and up to 2 times in 93.0 %: high 3 * 10 / 10 = 3
    gate, measured = ablation('a', [0.0] * 10, [0.0] * 9 + [10.0], [1] * 10)
    assert measured == {'d': 1.0, 'low': 0.0, 'high': 3.0, 'win': 0.1} and not gate.passed
    assert gate.bar == '95 % interval above 0; [0.000, 3.000], win 0.100'


@pytest.mark.parametrize('bar, passed', [(0.49, True), (0.5, False), (0.51, False), (-1.0, True)])
def test_the_interval_has_to_lie_above_the_bar(bar, passed):
    gate, measured = ablation('a', [0.0] * 8, [1.0] * 8, [2] * 8, bar=bar)    # every item: 0.5 nats a label
    assert gate.passed is passed and measured == {'d': 0.5, 'low': 0.5, 'high': 0.5, 'win': 1.0}


@pytest.mark.parametrize('min_win, passed', [(0.0, True), (0.9, True), (0.91, False)])
def test_the_share_of_items_that_win_has_its_own_bar(min_win, passed):
    gate, measured = ablation('a', [0.0] * 10, [5.0] * 9 + [-0.1], [1] * 10, min_win=min_win)
    assert gate.passed is passed and measured['win'] == 0.9 and measured['low'] > 0
    assert gate.bar.startswith('95 % interval above 0' + (f', win >= {min_win}; [' if min_win else '; ['))


def test_a_win_of_exactly_its_bar_passes():
    assert ablation('a', [0.0] * 9, [9.0] * 3 + [-0.0] * 6, [1] * 9, bar=-1, min_win=1 / 3)[0].passed


def test_seven_items_are_too_few_and_eight_will_do():
    assert not ablation('a', [0.0] * 7, [1.0] * 7, [1] * 7)[0].passed
    assert ablation('a', [0.0] * 8, [1.0] * 8, [1] * 8)[0].passed


def test_a_gate_that_fails_for_too_few_items_says_so():
    assert '7 items' in ablation('a', [0.0] * 7, [1.0] * 7, [1] * 7)[0].bar


@pytest.mark.parametrize('better, worse, counts', [
    ([], [], []), ([0.0] * 9, [1.0] * 9, [0] * 9), ([math.nan] + [0.0] * 8, [1.0] * 9, [1] * 9),
    ([0.0] * 9, [1.0] * 8 + [math.nan], [1] * 9)])
def test_no_items_no_labels_and_nan_fail(better, worse, counts):
    gate, measured = ablation('a', better, worse, counts, bar=-5.0)
    assert gate.passed is False and math.isnan(gate.value) and math.isnan(measured['low'])


def test_items_without_a_label_among_others_change_nothing():
    assert ablation('a', [0.0] * 9, [1.0] * 8 + [0.0], [2] * 8 + [0])[1]['d'] == 0.5


# -----------------------------------------------------------------------------
# the verdict


@pytest.mark.parametrize('change, values', [
    ({}, [0, 0, 0]),
    ({'trainable': {'a', 'b', 'c'}, 'with_gradient': {'a', 'b', 'c'}}, [1, 0, 0]),    # c is trained, nobody said so
    ({'trainable': {'a'}, 'with_gradient': {'a'}}, [1, 0, 0]),                        # b is not trained
    ({'trainable': {'a', 'c'}, 'with_gradient': {'a', 'c'}}, [2, 0, 0]),
    ({'with_gradient': {'b'}}, [0, 1, 0]),
    ({'after': 'f1'}, [0, 0, 1])])
def test_what_was_trained_is_what_was_declared_with_gradients_and_nothing_else_moved(change, values):
    names = dict.fromkeys(('declared', 'trainable', 'with_gradient'), {'a', 'b'})
    verdicts = trained_set(**{**names, 'before': 'f0', 'after': 'f0', **change})
    assert [g.value for g in verdicts] == values and [g.passed for g in verdicts] == [v == 0 for v in values]


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


def test_concluding_returns_0_when_all_passed(tmp_path, capsys):
    assert conclude(tmp_path, [GOOD, GOOD]) == 0
    assert json.loads((tmp_path / 'gates.json').read_text())['passed'] is True
    assert capsys.readouterr().out.splitlines()[-1] == f'{tmp_path}: 2 gates passed'


def test_concluding_without_a_gate_fails(tmp_path, capsys):
    assert conclude(tmp_path, []) == 1
    assert json.loads((tmp_path / 'gates.json').read_text()) == {'passed': False, 'gates': []}
    assert capsys.readouterr().out.splitlines()[-1] == f'{tmp_path}: FAILED at: no gate was measured'


@pytest.mark.parametrize('number', [np.float32(0.5), np.int64(0), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_can_be_judged_and_written(number, tmp_path):
    assert conclude(tmp_path, [at_most('a', number, 1)]) == 0


def test_a_stage_takes_only_an_input_whose_gates_passed(tmp_path):
    def refusal():
        with pytest.raises(SystemExit) as e:
            require_passed(tmp_path, False)
        assert require_passed(tmp_path, True) is None
        return e.value.code
    mend = '; mend it, or set allow_failed_gates = True to go on all the same'
    assert refusal() == f'{tmp_path} has no gates.json: its stage did not finish{mend}'
    with pytest.raises(SystemExit, match='gone: no such folder; run the stage that writes it first'):
        require_passed(tmp_path / 'gone', True)
    conclude(tmp_path, [GOOD, BAD])
    assert refusal() == f'{tmp_path} failed its gate "share answered"{mend}'
    conclude(tmp_path, [BAD, GOOD, BAD])
    assert refusal() == f'{tmp_path} failed its gate "share answered" and 1 more{mend}'
    conclude(tmp_path, [GOOD])
    assert require_passed(tmp_path, False) is None


def test_a_stage_refuses_an_input_that_measured_no_gate(tmp_path):
    (tmp_path / 'gates.json').write_text('{"passed": false, "gates": []}')
    with pytest.raises(SystemExit):
        require_passed(tmp_path, False)


# -----------------------------------------------------------------------------
# the report card and the curves


def report_card(monkeypatch, *argv):
    """The exit status, or message, of python gates.py with these arguments."""
    monkeypatch.setattr(sys, 'argv', ['gates.py', *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(REPO / 'gates.py'), run_name='__main__')
    return e.value.code


def test_the_report_card_is_the_exit_status(tmp_path, monkeypatch, capsys):
    conclude(tmp_path / 'a1', [GOOD])
    conclude(tmp_path / 'b3', [GOOD, GOOD])
    assert report_card(monkeypatch, tmp_path) == 0
    capsys.readouterr()
    conclude(tmp_path / 'b3', [GOOD, BAD])
    capsys.readouterr()
    assert report_card(monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out == (f'{tmp_path}/a1\n{gates.table([GOOD])}\n\n'
                                       f'{tmp_path}/b3\n{gates.table([GOOD, BAD])}\n\n')
    assert report_card(monkeypatch, tmp_path / 'a1') == 0 and report_card(monkeypatch, tmp_path / 'b3') == 1


def test_the_report_card_of_nothing_fails_with_a_message(tmp_path, monkeypatch):
    (tmp_path / 'a1').mkdir()
    assert report_card(monkeypatch, tmp_path) == (
        f'{tmp_path}: no gates.json here or one level below; run a stage first')
    assert report_card(monkeypatch, tmp_path / 'gone').startswith(f'{tmp_path}/gone: no gates.json')
    assert report_card(monkeypatch) == gates.__doc__.strip()


def test_the_table_has_a_line_for_each_gate():
    assert gates.table([GOOD, Gate('n', 2, '= 3', False)]) == ('pass  text loss      0.5000  <= 1\n'
                                                               'FAIL  n              2.0000  = 3')


def test_the_curves_of_a_log_are_a_picture_that_follows_the_log(tmp_path):
    losses = dict.fromkeys(('noise', 'zero', 'shuffled', 'correct'), 2.0)
    pictures = []
    for loss in 3.0, 1.0:
        records = [{'kind': 'run', 'stage': 'a1'}, {'kind': 'step', 'step': 1, 'window_loss': 4.0},
                   {'kind': 'step', 'step': 2, 'window_loss': loss}, {'kind': 'eval', 'step': 2, **losses}]
        (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
        curves(tmp_path / 'log.jsonl', tmp_path / 'curves.png')
        with Image.open(tmp_path / 'curves.png') as picture:
            assert (picture.format, picture.size) == ('PNG', (1210, 440))    # 11 x 4 inches at 110 dots
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]


def test_one_id_outside_its_range_or_one_golden_item_of_another_shape_fails():
    first, end, shapes = np.array([4, 8]), np.array([8, 12]), [(3, 2, 2)] * 2
    good = [np.zeros((3, 2, 2), np.uint8)] * 2
    assert all(g.passed for g in gates.written('t2i', [[4, 11], [7, 8]], first, end, good, shapes, 2))
    outside, decoded = gates.written('t2i', [[4, 12], [7, 8]], first, end, good[:1], shapes, 2)
    assert (outside.value, outside.passed, decoded.value, decoded.passed) == (1, False, 1, False)
    _, decoded = gates.written('t2a', [[4, 8]], first, end, [np.array([0.0, np.nan])], [(2,)], 1)
    assert not decoded.passed
    nothing = gates.written('t2i', [], first, end, [], [], 2)
    assert not any(g.passed for g in nothing)


def test_a_model_that_draws_or_sounds_nothing_or_noise_or_the_same_thing_has_collapsed():
    rng, t = np.random.default_rng(0), np.arange(4000) / 16000
    codes = [[n] for n in range(8)]
    pictures = [rng.integers(0, 255, (3, 8, 8)) for _ in codes]
    tones = [0.3 * np.sin(2 * np.pi * (200 + 10 * n) * t) for n in range(8)]

    def passed(codes, made, **bars):
        return [g.passed for g in gates.collapse('task', codes, made, 0.5, **bars)]
    assert passed(codes, pictures, pixel_std=10.0) == [True, True]
    assert passed([[1]] * 8, pictures, pixel_std=10.0) == [False, True]
    assert passed(codes, [np.full((3, 8, 8), 7)] * 8, pixel_std=10.0) == [True, False]
    assert passed(codes, tones, rms=0.01, spectral_std=6.0) == [True, True, True]
    assert passed(codes, [0 * t] * 8, rms=0.01, spectral_std=6.0) == [True, False, False]
    assert passed(codes, [rng.normal(size=4000)] * 8, rms=0.01, spectral_std=6.0) == [True, True, False]
    assert passed(codes, [t * np.nan] * 8, rms=0.01, spectral_std=6.0) == [True, False, False]
    assert passed([], [], rms=0.01, spectral_std=6.0) == [False] * 3
