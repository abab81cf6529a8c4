"""sweep_a11.py: every point is a run of its own, on the same held-out items; a restart skips what is finished."""
import csv
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import REPO, read_json, read_log, run_here

pytestmark = pytest.mark.stage


def sweep(*args):
    """sweep_a11.py in this process, and so the runs that it starts; without the processes, a minute less."""
    popen = subprocess.Popen

    def start_here(command, **options):
        if command[0] != sys.executable:
            return popen(command, **options)           # git, for the log
        code, _ = run_here(*command[1:])
        return SimpleNamespace(wait=lambda: code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, 'Popen', start_here)
        ended = run_here('sweep_a11.py', *args)
    gc.collect()                                       # its lock
    return ended


@pytest.fixture(scope='module')
def flags(a1_config):
    return [f'--base_config={a1_config}', "--grid={'learning_rate': [2e-2, 1e-3], 'vision_ln': [False, True]}",
            "--overrides={'epoch_samples': 32, 'n_golden': 3, 'n_predictions': 8}"]


@pytest.fixture(scope='module')
def swept(flags, tmp_path_factory):
    """(its out dir, its exit status)."""
    out = tmp_path_factory.mktemp('sweep') / 'out'
    code, _ = sweep(*flags, f'--out_dir={out}')
    return out, code


def test_each_point_is_trained_with_its_settings_on_one_eval_set(swept):
    out, _ = swept
    runs = [path.parent for path in out.glob('*/log.jsonl')]
    settings = [read_log(run, 'run')[0]['settings'] for run in runs]
    points = [(s['learning_rate'], s['vision_ln']) for s in settings]
    assert sorted(points) == [(1e-3, False), (1e-3, True), (2e-2, False), (2e-2, True)]
    assert len({(run / 'split.json').read_text() for run in runs}) == 1


def test_the_score_is_that_of_the_last_step_worked_out_again(swept):
    out, _ = swept
    with open(out / 'sweep.csv') as f:
        results = list(csv.DictReader(f))
    assert len(results) == 4 and (out / 'sweep.png').exists()
    for result in results:
        last = read_log(result['folder'], 'eval')[-1]
        by_hand = last['correct'] - 0.1 * (last['shuffled'] - last['correct'] + last['zero'] - last['correct'])
        assert last['step'] == 4 and float(result['score']) == pytest.approx(by_hand)
    scores = [float(result['score']) for result in results]
    assert scores == sorted(scores)


def test_a_run_that_did_not_look_is_marked(flags, tmp_path):
    _, printed = sweep(*flags, f'--out_dir={tmp_path}/out', "--grid={'learning_rate': [1e-3]}",
                       "--overrides={'epoch_samples': 8, 'n_predictions': 8, 'gate_input_recall': 0.9}")
    [run] = read_json(tmp_path / 'out' / 'sweep.json')['runs']
    assert run['looked'] is False and 0 <= run['input_found'] < 0.9 and 'FAILED, it did not look' in printed


def test_the_best_run_that_passed_becomes_a_config(swept, tmp_path):
    out, code = swept
    table = read_json(out / 'sweep.json')
    passed = [run for run in table['runs'] if run['gates_passed']]
    assert code == 0 and table['best'] == passed[0]
    code, _ = run_here('train_a1.py', out / 'best.py', f'--out_dir={tmp_path}')
    settings = read_log(tmp_path, 'run')[0]['settings']
    assert code == 0 and settings['learning_rate'] == passed[0]['learning_rate']
    assert (settings['epoch_samples'], settings['n_golden'], settings['n_predictions']) == (96, 9, 4)   # no overrides


def test_a_restart_skips_finished_runs_and_none_that_passed_is_an_error(swept, flags, tmp_path):
    shutil.copytree(swept[0], tmp_path / 'out')
    for path in (tmp_path / 'out').glob('*/gates.json'):
        path.write_text(json.dumps({**read_json(path), 'passed': False}))
    code, printed = sweep(*flags, f'--out_dir={tmp_path}/out')
    assert printed.count('finished before') == 4 and ': running' not in printed
    assert 'no run passed its gates' in code


@pytest.mark.parametrize('flag, found', [
    ('--base_config=none.py', 'no such file'),
    ('--grid={}', 'has no point'), ("--grid={'learning_rate': 1e-3}", 'learning_rate has 0.001, wanted a list'),
    ('--nproc_per_node=0', 'wanted at least 1'),
    ("--grid={'learning_rat': [1.0]}", 'the run ended early')])
def test_bad_input_gets_one_line(flags, tmp_path, flag, found):
    code, _ = sweep(*flags, f'--out_dir={tmp_path}', flag)
    assert found in code and len(code.splitlines()) == 1


def test_a_run_that_diverges_is_the_worst_and_the_sweep_goes_on_and_does_not_repeat_it(a1_config, tmp_path):
    command = (f'--base_config={a1_config}', f'--out_dir={tmp_path}/out', "--grid={'learning_rate': [1e30, 2e-2]}",
               "--overrides={'epoch_samples': 32, 'warmup_frac': 0.0, 'n_predictions': 0}")
    for printed in ': running', ': diverged before':
        code, output = sweep(*command)
        assert code == 0 and f'{tmp_path}/out/learning_rate=1e+30{printed}' in output
        best, worst = read_json(tmp_path / 'out' / 'sweep.json')['runs']
        assert (best['status'], worst['status']) == ('finished', 'diverged') and worst['score'] == math.inf
    assert 'diverged' in (tmp_path / 'out' / 'sweep.csv').read_text()
    page, _ = run_here('tools/report.py', tmp_path / 'out')
    assert page == 0 and 'Traceback' not in (tmp_path / 'out' / 'report.html').read_text()


def damage_json(path):
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize('name, harm, found', [
    ('gates.json', damage_json, 0), ('status.json', damage_json, 0),
    ('status.json', lambda path: path.write_text('[1]'), 0),
    ('log.jsonl', lambda path: path.write_text('{"kind"'), 'its first line is damaged')])
def test_a_damaged_run_is_judged_again_or_named(swept, flags, tmp_path, name, harm, found):
    shutil.copytree(swept[0], tmp_path / 'out')
    harm(tmp_path / 'out' / 'learning_rate=0.02,vision_ln=True' / name)
    code, printed = sweep(*flags, f'--out_dir={tmp_path}/out')
    assert code == found or found in code
    assert found or printed.count('finished before') == 3


def test_no_cell_of_the_table_starts_a_formula(a1_config, tmp_path):
    lora_like = ['=1+1', '+x', '-x', '@x', '\tx', "plain"]
    command = (f'--base_config={a1_config}', f'--out_dir={tmp_path}/out', f"--grid={{'feature_cache': {lora_like!r}}}")
    for value in lora_like:
        folder = tmp_path / 'out' / f'feature_cache={value}'
        folder.mkdir(parents=True)
        (folder / 'status.json').write_text('{"state": "finished"}')
        (folder / 'gates.json').write_text('{"losses": {"correct": -1.0, "shuffled": 2.0, "zero": 3.0}}')
        (folder / 'log.jsonl').write_text('{"settings": {}, "epoch_samples": 8}\n')
    assert 'no run passed its gates' in sweep(*command)[0]
    with open(tmp_path / 'out' / 'sweep.csv') as f:
        rows = list(csv.DictReader(f))
    assert sorted(row['feature_cache'] for row in rows) == ["'\tx", "'+x", "'-x", "'=1+1", "'@x", 'plain']
    assert {row['loss'] for row in rows} == {'-1.0'}   # a number stays one


FAKE_TRAINING = '''
import signal, sys, time
from pathlib import Path
out = Path(next(word for word in sys.argv if word.startswith('--out_dir=')).split('=', 1)[1])
def save(number, frame):
    (out / 'saved').touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
out.mkdir(parents=True)
(out / 'started').touch()
time.sleep(60)
'''


def test_a_sweep_that_is_stopped_lets_its_training_save(tmp_path):
    (tmp_path / 'sweep_a11.py').write_text((REPO / 'sweep_a11.py').read_text())
    (tmp_path / 'train_a1.py').write_text(FAKE_TRAINING)
    (tmp_path / 'base.py').write_text('')
    command = [sys.executable, 'sweep_a11.py', '--base_config=base.py', '--out_dir=out', "--grid={'seed': [1, 2]}"]
    sweep = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(REPO)}, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while sweep.poll() is None and not (tmp_path / 'out' / 'seed=1' / 'started').exists():
        time.sleep(0.02)
    sweep.terminate()
    _, errors = sweep.communicate(timeout=30)
    assert sweep.returncode == 1 and (tmp_path / 'out' / 'seed=1' / 'saved').exists()
    assert errors == 'SIGTERM stopped this sweep; start it again to go on with it\n'
    assert not (tmp_path / 'out' / 'seed=2').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_runs_ends_the_sweep(flags, swept, tmp_path, number, monkeypatch):
    """It comes when a run has finished."""
    shutil.copytree(swept[0], tmp_path / 'out')
    loads = json.loads

    def loads_and_signal(text, **options):
        if '"finished"' in text:
            os.kill(os.getpid(), number)
        return loads(text, **options)

    monkeypatch.setattr(json, 'loads', loads_and_signal)
    code, printed = sweep(*flags, f'--out_dir={tmp_path}/out')
    assert code == f'{number.name} stopped this sweep; start it again to go on with it'
    assert printed.count('finished before') == 1
