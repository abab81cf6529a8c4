"""sweep_a11.py: every point is a run of its own, on the same held-out items; a restart skips what is finished."""
import csv
import json

import pytest
from conftest import read_log, run_script
from test_train_a1 import config  # noqa: F401  the tiny A1 config


@pytest.fixture(scope='module')
def swept(config, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp('sweep') / 'out'
    args = [f'--base_config={config}', f'--out_dir={out}',
            "--grid={'learning_rate': [2e-2, 1e-3], 'vision_ln': [False, True]}",
            "--overrides={'epoch_samples': 32, 'gate_ablation_nats': -9.0, 'n_golden': 3, 'n_predictions': 0}"]
    return out, args, run_script('sweep_a11.py', *args)


def test_each_point_is_trained_with_its_settings_on_one_eval_set(swept):
    out, _, done = swept
    runs = sorted(p for p in out.iterdir() if p.is_dir() and (p / 'log.jsonl').exists())
    assert len(runs) == 4, done.stderr
    settings = [read_log(p, 'run')[0]['settings'] for p in runs]
    assert {(s['learning_rate'], s['vision_ln']) for s in settings} == {
        (2e-2, False), (2e-2, True), (1e-3, False), (1e-3, True)}
    assert len({(p / 'split.json').read_text() for p in runs}) == 1


def test_the_score_is_that_of_the_last_step_worked_out_again(swept):
    out, _, _ = swept
    rows = list(csv.DictReader(open(out / 'sweep.csv')))
    assert len(rows) == 4 and (out / 'sweep.png').exists()
    for row in rows:
        last = read_log(row['folder'], 'eval')[-1]
        assert last['step'] == 4
        by_hand = last['correct'] - 0.1 * (last['shuffled'] - last['correct'] + last['zero'] - last['correct'])
        assert float(row['score']) == pytest.approx(by_hand)
    assert [float(r['score']) for r in rows] == sorted(float(r['score']) for r in rows)


def test_the_best_run_that_passed_becomes_a_config_and_none_is_an_error(swept, tmp_path):
    out, _, done = swept
    table = json.loads((out / 'sweep.json').read_text())
    good = [r for r in table['runs'] if r['gates_passed']]
    assert table['best'] == (good[0] if good else None)
    if good:
        assert done.returncode == 0
        text = (out / 'best.py').read_text()
        assert f"learning_rate = {good[0]['learning_rate']!r}" in text
        again = run_script('train_a1.py', out / 'best.py', f'--out_dir={tmp_path}')
        assert 'Traceback' not in again.stderr
    else:
        assert done.returncode == 1 and 'no run passed its gates' in done.stderr


def test_a_restart_skips_finished_runs(swept):
    out, args, _ = swept
    again = run_script('sweep_a11.py', *args)
    assert again.stdout.count('finished before') == 4 and ': running' not in again.stdout


@pytest.mark.parametrize('change, found', [('--base_config=none.py', 'no such file'), ('--grid={}', 'has no point'),
                                           ("--grid={'learning_rat': [1.0]}", "did you mean 'learning_rate'")])
def test_bad_input_gets_one_line(config, tmp_path, change, found):  # noqa: F811
    done = run_script('sweep_a11.py', f'--base_config={config}', f'--out_dir={tmp_path}', change)
    assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr
