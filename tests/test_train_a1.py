"""train_a1.py: it learns to see, gates can fail, a run can be stopped, resumed, split; and, once, what all training
scripts do alike."""
import shutil
import re
import signal
import sys
import types

import numpy as np
import pytest
from conftest import (
    REPO, alter_weights, assert_close_run, assert_same_run, back_at_checkpoint, damage, failed_gates, in_children,
    on_ranks, read_gates, read_json, read_lines, read_log, run_here, run_script, run_until)

from common import lock_run

pytestmark = pytest.mark.stage


def test_it_learns_to_see_passes_its_gates_and_writes_what_it_promises(a1_colours):
    out = a1_colours.out
    evals = read_log(out, 'eval')
    assert [record['step'] for record in evals] == [0, 50, 60]
    assert evals[0]['correct'] > 3 and evals[-1]['correct'] < 1 < evals[-1]['shuffled'] - 2
    assert a1_colours.code == 0 and len(read_gates(out)) == 18 and '18 gates passed' in a1_colours.printed
    predictions = read_lines(out / 'predictions.jsonl')
    assert len(predictions) == 24
    assert np.mean([line['prediction'] == line['truth'] for line in predictions]) > 0.9
    golden = read_lines(out / 'golden' / 'step_000060.jsonl')
    assert len(golden) == 3 and set(golden[0]) == {'id', 'image', 'truth', 'prediction', 'image_sha256'}
    assert (out / 'golden' / 'step_000060.png').exists() and (out / 'curves.png').exists()
    assert read_json(out / 'status.json') == {'state': 'finished', 'step': 60, 'n_steps': 60}
    assert {path.name for path in (out / 'ckpt').iterdir()} == {
        'connector.pt', 'optimizer.pt', 'meta.json', 'manifest.json'}
    split = read_json(out / 'split.json')
    assert not set(split['eval']) & set(split['golden'])
    assert set(split['eval'] + split['golden']) <= set(split['held_out'])


def test_a_connector_that_never_sees_an_image_fails_the_ordering(a1_config, a1_colours, tmp_path):
    """The run that passed above by an edited copy of the script, which sees grey pictures in training."""
    source = (REPO / 'train_a1.py').read_text()
    line = '        loss_sum = model(batch.to(device))\n'
    assert source.count(line) == 1
    grey = '        batch.images = torch.full_like(batch.images, 127)\n'
    (tmp_path / 'blind.py').write_text(source.replace(line, grey + line))
    settings = read_log(a1_colours.out, 'run')[0]['settings']
    names = ('data_json', 'image_root', 'llm', 'learning_rate', 'epoch_samples', 'n_eval', 'gate_ablation_nats')
    flags = [f'--{name}={settings[name]}' for name in names]
    done = run_script(tmp_path / 'blind.py', a1_config, *flags, f'--out_dir={tmp_path}/out')
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert 'shuffled image costs more than the right one' in failed_gates(tmp_path / 'out')


def test_a_config_that_truncates_ends_before_the_first_step(a1_config, tmp_path):
    command = 'train_a1.py', a1_config, f'--out_dir={tmp_path}', '--max_seq_len=24', '--epoch_samples=8'
    code, _ = run_here(*command, '--bucket_edges=(12,14)')
    assert re.fullmatch('this run would fail at its end by "share of truncated samples": 0.[0-9]+, wanted <= 0.01: '
                        'raise max_seq_len or gate_truncated, or leave the long ones out', code)
    assert not (tmp_path / 'log.jsonl').exists()
    run_here(*command, '--bucket_edges=(12,14)', '--gate_truncated=1')
    assert 0 < read_gates(tmp_path)['share of truncated samples']['value'] < 1


@pytest.mark.parametrize('number, step', [(signal.SIGKILL, 10), (signal.SIGTERM, 10), (signal.SIGTERM, 8),
                                          (signal.SIGTERM, 12)])
def test_a_stopped_run_goes_on_as_the_same_run_to_the_last_bit(a1_config, a1_run, tmp_path, number, step, capfd):
    """kill -9 falls back to the checkpoint of step 8; SIGTERM saves first. Evaluations of steps 8 and 12 that
    it puts off come after the resume."""
    command = run_here, 'train_a1.py', a1_config, f'--out_dir={tmp_path}'
    status = in_children(run_until, step, number, *command)
    if number == signal.SIGKILL:
        assert status == [-signal.SIGKILL]
    else:
        assert status == [1] and f'SIGTERM stopped this run: saved at step {step}' in capfd.readouterr().err
        assert read_json(tmp_path / 'status.json')['state'] == 'stopped'
    code, _ = run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}', '--resume=True')
    assert code == a1_run.code
    assert_same_run(tmp_path, a1_run.out, tensors=['connector'])


def test_a_killed_run_goes_on_from_a_checkpoint_between_evaluations(a1_config, a1_run, tmp_path):
    """Of step 10: the last evaluation was at step 8."""
    status = in_children(run_until, 11, signal.SIGKILL, run_here, 'train_a1.py', a1_config, f'--out_dir={tmp_path}',
                         '--save_minutes=1e-6')
    assert status == [-signal.SIGKILL] and read_json(tmp_path / 'ckpt' / 'meta.json')['step'] == 10
    code, _ = run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}', '--resume=True')
    assert code == a1_run.code
    assert_same_run(tmp_path, a1_run.out, tensors=['connector'])


def test_resume_falls_back_when_the_last_checkpoint_is_damaged(a1_config, a1_run, tmp_path, capsys):
    shutil.copytree(a1_run.out, tmp_path / 'run')
    damage(tmp_path / 'run' / 'ckpt' / 'connector.pt')
    run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}/run', '--resume=True')
    assert 'ckpt.prev' in capsys.readouterr().err
    assert_same_run(tmp_path / 'run', a1_run.out, tensors=['connector'])


def test_resume_refuses_other_settings_and_other_weights(a1_config, tiny, tmp_path):
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    command = ['train_a1.py', a1_config, f'--out_dir={tmp_path}/out', f'--llm={tmp_path}/llm', '--epoch_samples=8']
    run_here(*command)
    code, _ = run_here(*command, '--resume=True', '--num_image_tokens=8')
    assert code.endswith('has num_image_tokens = 4, this run has 8: cannot resume')
    alter_weights(tmp_path / 'llm')
    code, _ = run_here(*command, '--resume=True')
    assert 'was trained on other frozen weights' in code


def test_a_finished_run_is_judged_again_and_not_overwritten(a1_config, a1_run, tmp_path):
    shutil.copytree(a1_run.out, tmp_path / 'run')
    command = 'train_a1.py', a1_config, f'--out_dir={tmp_path}/run'
    code, _ = run_here(*command)
    assert 'holds a checkpoint: set resume = True' in code
    assert run_here(*command, '--resume=True')[0] == a1_run.code
    assert (tmp_path / 'run' / 'log.jsonl').read_text() == (a1_run.out / 'log.jsonl').read_text()


def test_a_new_run_goes_on_from_the_weights_of_another(a1_config, a1_run, tmp_path):
    """Of the steps that it is asked for, without a first evaluation; and only where the weights fit."""
    command = 'train_a1.py', a1_config, f'--init_from={a1_run.out}'
    run_here(*command, f'--out_dir={tmp_path}/on', '--n_steps=2', '--eval_first=False', '--log_every=1',
             '--learning_rate=1e-9', '--epochs=3')
    [only] = read_log(tmp_path / 'on', 'eval')
    assert only['step'] == 2
    # at this rate it is the other run's model
    assert only['correct'] == pytest.approx(read_log(a1_run.out, 'eval')[-1]['correct'], rel=1e-4)
    code, _ = run_here(*command, f'--out_dir={tmp_path}/other', '--num_image_tokens=8')
    assert 'init_from: ' in code and 'has num_image_tokens = 4, this run has 8' in code
    code, _ = run_here(*command, f'--out_dir={tmp_path}/less', '--n_steps=-1')
    assert code == 'n_steps = -1: wanted 0 or more'


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(a1_config, a1_run, tmp_path):
    """Loss and gradient norm of every step agree to 1e-4 relative: sums in another order, nothing else."""
    code, _ = run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}/micro', '--micro_batch_size=3')
    assert code == a1_run.code
    done = run_script('train_a1.py', a1_config, f'--out_dir={tmp_path}/ranks', '--micro_batch_size=4', ranks=2)
    assert done.returncode == a1_run.code, done.stderr
    for other in 'micro', 'ranks':
        assert_close_run(tmp_path / other, a1_run.out, ['loss', 'grad_norm'], rtol=1e-4)


def test_three_ranks_that_share_the_layers_are_one_run(a1_config, a1_run, tmp_path):
    """With unlike many micro-batches of a step, and items of an evaluation, on each."""
    out = back_at_checkpoint(a1_run.out, tmp_path / 'out')
    status = on_ranks(3, run_here, 'train_a1.py', a1_config, f'--out_dir={out}', '--resume=True',
                      '--micro_batch_size=1', '--shard=True')
    assert status == [a1_run.code] * 3 and read_log(out)[-1]['step'] == 12
    assert_close_run(out, a1_run.out, ['loss', 'grad_norm'], rtol=1e-4)


def test_cached_features_give_the_run_of_the_tower_itself(a1_config, a1_run, tmp_path):
    """To half precision, in which the cache stores them."""
    run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}/out', f'--feature_cache={tmp_path}/features')
    assert_close_run(tmp_path / 'out', a1_run.out, ['loss'], rtol=2e-3)


def test_an_epoch_is_sized_from_measured_steps_and_kept(a1_config, tmp_path):
    command = 'train_a1.py', a1_config, f'--out_dir={tmp_path}', '--epoch_samples=0', '--epoch_minutes=0.002'
    _, printed = run_here(*command)
    epoch_samples = read_log(tmp_path, 'run')[0]['epoch_samples']
    assert epoch_samples >= 8 and epoch_samples % 8 == 0
    assert f'repeat exactly with --epoch_samples={epoch_samples}' in printed
    _, printed = run_here(*command, '--resume=True')
    assert f'--epoch_samples={epoch_samples}' in printed


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_samples(a1_config, tmp_path):
    code, _ = run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}', '--learning_rate=1e30', '--warmup_frac=0.0')
    assert 'stopped before the update' in code and 'captions-0' in code


@pytest.mark.parametrize('flag, found', [
    ('--llm=nowhere', 'nowhere: no Hugging Face model here'),
    ('--image_root=nowhere', 'cannot read this image'),
    ('--device=cuda', 'this machine shows no CUDA device'),
    ('--seed=-1', 'seed = -1: wanted 0 or more'), ('--n_eval=4', 'n_eval = 4: wanted 8 or more'),
    ('--bucket_edges=(5,10,20)', 'bucket_edges = (5, 10, 20): wanted two'),
    ('--epochs=-1', 'epochs = -1.0: wanted more than 0'), ('--connector_heads=3', 'wanted a multiple of the heads')])
def test_bad_input_gets_one_line(a1_config, tmp_path, flag, found):
    code, _ = run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}', flag)
    assert found in code and len(code.splitlines()) == 1


def test_two_processes_cannot_write_one_folder(a1_config, tmp_path):
    """Also what a user sees of an error: one line, and the exit status 1."""
    lock = lock_run(tmp_path)
    done = run_script('train_a1.py', a1_config, f'--out_dir={tmp_path}')
    lock.release()
    assert done.returncode == 1 and done.stderr.startswith(f'{tmp_path}: another run is writing here')
    assert len(done.stderr.splitlines()) == 1


class Board:
    """A stand-in for TensorBoard's writer, which keeps the points."""
    def __init__(self, folder, purge_step):
        self.points = [('purge', 0, purge_step)]
        Board.last = self

    def add_scalar(self, *point):
        self.points.append(point)

    def flush(self):
        pass


def test_tensorboard_shows_what_the_log_says_once_also_after_a_resume(a1_config, a1_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Board))
    out = back_at_checkpoint(a1_run.out, tmp_path / 'out')
    run_here('train_a1.py', a1_config, f'--out_dir={out}', '--resume=True', '--tensorboard=True')
    wanted = [('purge', 0, 9)]
    for record in read_lines(out / 'log.jsonl'):
        if record.get('step', 0) > 8:
            names = [name for name in record if name not in ('kind', 'step')]
            wanted += [(f'{record["kind"]}/{name}', record[name], record['step']) for name in names]
    assert Board.last.points == wanted and len(wanted) > 40
