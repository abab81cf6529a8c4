"""train_a1.py as a user runs it, on a tiny world: it learns, gates can fail, a run can be stopped, resumed, split."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, read_log, run_script

CHECKS = 'shuffled image', 'zero image', 'noise image', 'zeros cost more'


@pytest.fixture(scope='module')
def config(tiny, tmp_path_factory):
    """A config file over the tiny world: 12 steps of 8 rows, float32, evaluated at steps 0, 6 and 12."""
    path = tmp_path_factory.mktemp('a1') / 'a1_tiny.py'
    path.write_text(f'''
data_json = '{tiny}/captions/data.json'
image_root = '{tiny}/captions/images'
llm = '{tiny}/llm'
vision = '{tiny}/vision'
num_image_tokens = 4
connector_width = 32
connector_depth = 1
connector_heads = 2
max_seq_len = 128
rows_per_step = 8
batch_size = 8
learning_rate = 2e-2
epoch_samples = 96
eval_every = 6
n_eval = 24
n_golden = 9
n_predictions = 4
max_new_tokens = 4
log_every = 1
''')
    return path


@pytest.fixture(scope='module')
def straight(config, tmp_path_factory):
    """The out dir of one uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp('straight')
    done = run_script('train_a1.py', config, f'--out_dir={out}')
    assert 'Traceback' not in done.stderr, done.stderr
    return out, done


def connector_of(out):
    return torch.load(out / 'ckpt' / 'connector.pt', weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_leaves_everything_it_promises(straight):
    out, done = straight
    evals = read_log(out, 'eval')
    assert [e['step'] for e in evals] == [0, 6, 12]
    assert evals[-1]['correct'] < evals[0]['correct'] - 0.1
    gates = {g['name']: g for g in json.loads((out / 'gates.json').read_text())['gates']}
    exact = [g for name, g in gates.items() if not name.startswith(CHECKS)]
    assert len(exact) == 5 and all(g['passed'] for g in exact)
    assert done.returncode == (0 if all(g['passed'] for g in gates.values()) else 1)
    golden = [json.loads(line) for line in (out / 'golden' / 'step_000012.jsonl').read_text().splitlines()]
    assert len(golden) == 9 and set(golden[0]) == {'id', 'image', 'truth', 'prediction', 'image_sha256'}
    assert (out / 'golden' / 'step_000012.png').exists() and (out / 'curves.png').exists()
    assert len((out / 'predictions.jsonl').read_text().splitlines()) == 4
    assert json.loads((out / 'status.json').read_text())['state'] == 'finished'
    assert 'llm' not in ' '.join(connector_of(out))    # light: the connector only
    split = json.loads((out / 'split.json').read_text())
    assert not set(split['eval']) & set(split['golden'])
    assert set(split['eval'] + split['golden']) <= set(split['held_out'])


def test_a_connector_that_never_sees_an_image_fails_the_ordering(config, tmp_path):
    """Trained on zeros instead of features: the right picture then costs as much as another one."""
    script = tmp_path / 'blind_a1.py'
    source = (REPO / 'train_a1.py').read_text()
    line = "        loss_sum = vlm(batch.to(device))\n"
    assert line in source
    blinded = line.replace('(batch', '(blind(batch').replace('device))', 'device)))')
    script.write_text(source.replace(line, blinded).replace(
        'def forward_backward', 'def blind(batch):\n    batch.images = torch.full_like(batch.images, 127)\n'
        '    return batch\n\n\ndef forward_backward'))
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, script, config, f'--out_dir={tmp_path}/out', '--epoch_samples=48',
                           '--gate_ablation_nats=0.02'], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert 'FAILED at: shuffled image costs more than the right one' in done.stdout


def test_a_config_that_truncates_fails_truncation(config, tmp_path):
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}', '--max_seq_len=24', '--epoch_samples=8',
                      '--bucket_edges=(12,14)')
    assert done.returncode == 1 and 'share of truncated samples' in done.stdout.splitlines()[-1]


@pytest.mark.parametrize('ends', ['kill', 'terminate'])
def test_a_stopped_run_goes_on_as_the_same_run_to_the_last_bit(config, straight, tmp_path, ends):
    """kill -9 falls back to the last checkpoint; SIGTERM saves first."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    args = [sys.executable, 'train_a1.py', str(config), f'--out_dir={tmp_path}']
    process = subprocess.Popen(args, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / 'ckpt').exists():
        time.sleep(0.002)                              # the checkpoint of step 6 is there, steps 7 to 12 are not
    process.send_signal(signal.SIGKILL if ends == 'kill' else signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode != 0
    if ends == 'terminate':
        assert 'SIGTERM stopped this run: saved at step' in said
        assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'stopped'
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}', '--resume=True')
    out, whole = straight
    assert done.returncode == whole.returncode, done.stderr
    assert same(connector_of(tmp_path), connector_of(out))
    for key in 'step', 'loss', 'grad_norm', 'lr':
        assert [r[key] for r in read_log(tmp_path)] == [r[key] for r in read_log(out)]
    assert [e['correct'] for e in read_log(tmp_path, 'eval')] == [e['correct'] for e in read_log(out, 'eval')]


def test_resume_falls_back_when_the_last_checkpoint_is_damaged(config, straight, tmp_path):
    out, _ = straight
    shutil.copytree(out, tmp_path / 'run')
    with open(tmp_path / 'run' / 'ckpt' / 'connector.pt', 'r+b') as f:
        f.seek(200)
        byte = f.read(1)
        f.seek(200)
        f.write(bytes([byte[0] ^ 1]))
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}/run', '--resume=True')
    assert 'ckpt.prev' in done.stderr and same(connector_of(tmp_path / 'run'), connector_of(out))


@pytest.mark.parametrize('change, found', [
    ('--num_image_tokens=8', 'has num_image_tokens = 4, this run has 8: cannot resume'),
    ('--learning_rate=1e-3', 'has learning_rate = 0.02, this run has 0.001: cannot resume')])
def test_resume_refuses_another_run(config, straight, change, found):
    done = run_script('train_a1.py', config, f'--out_dir={straight[0]}', '--resume=True', change)
    assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr


def test_a_finished_run_is_judged_again_and_its_log_stays_as_it_is(config, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / 'run')
    again = run_script('train_a1.py', config, f'--out_dir={tmp_path}/run', '--resume=True')
    assert again.returncode == straight[1].returncode
    assert (tmp_path / 'run' / 'log.jsonl').read_text() == (straight[0] / 'log.jsonl').read_text()


def test_a_folder_with_a_checkpoint_is_not_overwritten(config, straight):
    done = run_script('train_a1.py', config, f'--out_dir={straight[0]}')
    assert done.returncode == 1 and 'holds a checkpoint: set resume = True' in done.stderr


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(config, straight, tmp_path):
    """Loss and gradient norm of every step agree to 1e-4 relative: sums in another order, nothing else."""
    want = read_log(straight[0])
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}/micro', '--batch_size=3')
    assert 'Traceback' not in done.stderr, done.stderr
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}/ranks', '--batch_size=4', ranks=2)
    assert (tmp_path / 'ranks' / 'gates.json').exists(), done.stderr
    for other in 'micro', 'ranks':
        got = read_log(tmp_path / other)
        for key in 'loss', 'grad_norm':
            np.testing.assert_allclose([r[key] for r in got], [r[key] for r in want], rtol=1e-4)
        np.testing.assert_allclose([e['shuffled'] for e in read_log(tmp_path / other, 'eval')],
                                   [e['shuffled'] for e in read_log(straight[0], 'eval')], rtol=1e-4)


def test_cached_features_give_the_run_of_the_tower_itself(config, straight, tmp_path):
    """To fp16: the cache stores half precision."""
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}/out', f'--feature_cache={tmp_path}/features')
    assert 'Traceback' not in done.stderr, done.stderr
    np.testing.assert_allclose([r['loss'] for r in read_log(tmp_path / 'out')],
                               [r['loss'] for r in read_log(straight[0])], rtol=2e-3)


def test_an_epoch_is_sized_from_measured_steps_and_kept(config, tmp_path):
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}', '--epoch_samples=0', '--epoch_minutes=0.005')
    run = read_log(tmp_path, 'run')[0]
    assert run['epoch_samples'] >= 8 and run['epoch_samples'] % 8 == 0
    assert f'repeat exactly with --epoch_samples={run["epoch_samples"]}' in done.stdout
    again = run_script('train_a1.py', config, f'--out_dir={tmp_path}', '--epoch_samples=0', '--epoch_minutes=0.005',
                       '--resume=True')
    assert f'--epoch_samples={run["epoch_samples"]}' in again.stdout


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_samples(config, tmp_path):
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}', '--learning_rate=1e30', '--warmup_frac=0.0')
    assert done.returncode == 1 and 'stopped before the update' in done.stderr and 'captions-0' in done.stderr


@pytest.mark.parametrize('change, found', [
    ('--llm=nowhere', 'nowhere: no Hugging Face model here'),
    ('--data_json=nowhere.json', 'nowhere.json: cannot read the data set'),
    ('--device=cuda', 'this machine shows no CUDA device'),
    ('--image_root=nowhere', 'cannot read this image'),
    ('--dtype=float17', "dtype = 'float17'"),
    ('--n_eval=4000', 'to evaluate on')])
def test_bad_input_gets_one_line(config, tmp_path, change, found):
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}', change)
    assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_two_runs_cannot_write_one_folder(config, tmp_path):
    from common import lock_run
    lock = lock_run(tmp_path)
    done = run_script('train_a1.py', config, f'--out_dir={tmp_path}')
    lock.release()
    assert done.returncode == 1 and 'another run is writing here' in done.stderr


STUB = '''
import json, runpy, sys, types
class SummaryWriter:
    """Writes each point as a line; a resume says from which step on points come again."""
    def __init__(self, folder, purge_step=None):
        import os
        os.makedirs(folder, exist_ok=True)
        self.file = open(folder + '/points', 'a')
        self.line('purge', 0, purge_step)
    def line(self, *what):
        print(json.dumps(what), file=self.file, flush=True)
    add_scalar = line
    def flush(self):
        pass
sys.modules['torch.utils.tensorboard'] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
sys.path[:0], sys.argv = ['REPO'], sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_tensorboard_shows_what_the_log_says_once_also_after_a_resume(config, straight, tmp_path):
    """A stub in its place: a run is stopped after step 6, which its log has gone past, and resumed."""
    (tmp_path / 'with_stub.py').write_text(STUB.replace('REPO', str(REPO)))
    args = 'train_a1.py', config, f'--out_dir={tmp_path}/out'
    shutil.copytree(straight[0], tmp_path / 'out')     # a run without a board ...
    shutil.rmtree(tmp_path / 'out' / 'ckpt')           # ... of which the checkpoint of step 6 is left
    done = run_script(tmp_path / 'with_stub.py', *args, '--resume=True', '--tensorboard=True')
    assert done.returncode == straight[1].returncode, done.stderr
    points = [json.loads(line) for line in (tmp_path / 'out/tensorboard/points').read_text().splitlines()]
    wanted = [[f'{r["kind"]}/{name}', value, r['step']] for kind in ('step', 'eval')
              for r in read_log(tmp_path / 'out', kind) if r['step'] > 6
              for name, value in r.items() if name not in ('kind', 'step')]
    assert points[0] == ['purge', 0, 7] and sorted(points[1:]) == sorted(wanted) and len(wanted) > 60


def test_a_tensorboard_that_is_not_installed_ends_the_run_before_it_begins(config, tmp_path):
    (tmp_path / 'without.py').write_text(STUB.replace('REPO', str(REPO)).replace(
        'types.SimpleNamespace(SummaryWriter=SummaryWriter)', 'None'))
    done = run_script(tmp_path / 'without.py', 'train_a1.py', config, f'--out_dir={tmp_path}/out', '--tensorboard=True')
    assert done.returncode == 1 and 'pip install tensorboard' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out' / 'log.jsonl').exists()
