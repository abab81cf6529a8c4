"""training.py: a run's folder, signals, log and meter, and what surrounds an update, against values by hand."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, assert_same_run, on_two_ranks, read_lines, run_here
from test_common import Clock, no_file_larger_than, results_on_two_ranks, refusal, save

import training
from common import BETWEEN_BATCHES, rank_parts
from training import (
    Log, Meter, StopSignal, check_resumable, check_same_data, clip_gradients, frozen_sha256, grad_norms, measure_epoch,
    names_with_gradient, open_run, parameter_groups, require_not_negative, require_numbers, require_positive,
    require_share, require_split, stop_if_eval_not_finite, stop_if_not_finite, tensorboard_writer, write_status)
from watch import WATCH

# -----------------------------------------------------------------------------
# a run


def test_a_folder_with_a_checkpoint_is_only_gone_on_with_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, 'HELD_LOCKS', [])
    out = tmp_path / 'run'
    assert open_run(str(out), True, 0) == (out, False)     # nothing to resume: a new run
    assert capsys.readouterr().out == f'{out} holds no checkpoint yet: this run begins at its first step\n'
    assert refusal(open_run, '', False, rank=0) == "out_dir = '': wanted a folder"
    assert 'another run is writing here' in refusal(open_run, out, False, rank=0)
    training.HELD_LOCKS.clear()
    save(out / 'ckpt', 1)
    assert refusal(open_run, out, False, rank=0) == (
        f'{out} holds a checkpoint: set resume = True to go on with it, or another out_dir')
    training.HELD_LOCKS.clear()
    assert open_run(out, True, 0) == (out, True)
    write_status(out, 'running', 3, 10)
    assert json.loads((out / 'status.json').read_text()) == {'state': 'running', 'step': 3, 'n_steps': 10}


def test_resuming_names_the_first_setting_that_differs_and_forgives_those_of_the_machine():
    had = {'micro_batch_size': 4, 'bucket_edges': [10, 20], 'n_image': 8192, 'seed': 1, 'tensorboard': False}
    meta = {'settings': had, 'frozen_sha256': 'a' * 64}
    now = {**had, 'micro_batch_size': 8, 'bucket_edges': (10, 20), 'tensorboard': True}
    assert check_resumable(meta, now, 'a' * 64, 'out/ckpt') is None
    assert refusal(check_resumable, meta, {**now, 'n_image': 16384, 'seed': 2}, 'a' * 64, folder='out/ckpt') == (
        'out/ckpt has n_image = 8192, this run has 16384: cannot resume')
    assert refusal(check_resumable, meta, now, 'b' * 64, folder='out/ckpt') == (
        'out/ckpt was trained on other frozen weights (sha256 aaaaaaaaaaaa, this run has bbbbbbbbbbbb), '
            'or in another dtype: cannot resume')


def test_resuming_names_the_first_part_of_the_data_that_differs():
    meta = {'data': {'the number of samples': 9, "sample 'x'": 'c', 'text_jsonl': 'd'}}
    assert check_same_data(meta, dict(meta['data']), 'out/ckpt') is None
    assert refusal(check_same_data, meta, {**meta['data'], "sample 'x'": 'e', 'text_jsonl': 'f'}, 'out/ckpt') == (
        "out/ckpt was trained on other data: sample 'x' was c, is e now: restore it, or train anew")
    assert 'text_jsonl was d, is gone now' in refusal(
        check_same_data, meta, {'the number of samples': 9, "sample 'x'": 'c'}, 'out/ckpt')


@pytest.fixture
def handlers():
    """Put the signal handlers back after a test."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)
    BETWEEN_BATCHES.clear()


def test_a_signal_is_noted_and_a_second_ctrl_c_ends_at_once(handlers):
    stop = StopSignal()
    assert not stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop
    stop.save = lambda state: stop.saved(step=5)
    assert 'saved at step 5, go on with --resume=True' in refusal(list, rank_parts('ab', 1, 0, 1))
    stop.saved(step=7)
    assert refusal(stop.leave) == 'SIGTERM stopped this run: saved at step 7, go on with --resume=True'
    stop.saved(step=0)                                 # where no checkpoint is written
    assert refusal(stop.leave) == 'SIGTERM stopped this run before its first step: nothing was saved'
    stop = StopSignal()
    assert not stop
    os.kill(os.getpid(), signal.SIGINT)
    assert stop and stop.name == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    StopSignal()                                       # not asked yet: data is prepared
    line = refusal(os.kill, os.getpid(), signal.SIGTERM)
    assert line == 'SIGTERM stopped this run before its first step: nothing was saved'
    StopSignal(is_resumed=True)                        # there is a checkpoint, which the start does not touch
    line = refusal(os.kill, os.getpid(), signal.SIGTERM)
    assert line.endswith('before its first step: its checkpoint is as it was, go on with --resume=True')


def stopped_on_rank_1(rank):
    stop = StopSignal()
    before = bool(stop)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    stop.saved(step=7)
    return before, bool(stop), refusal(stop.leave).split(':')[0]


def test_a_signal_on_one_rank_stops_them_all():
    assert results_on_two_ranks(stopped_on_rank_1) == [
        (False, True, 'another rank stopped this run'), (False, True, 'SIGTERM stopped this run')]


def looks_on_rank_1(rank):
    """At which of 40 steps a signal, which comes to rank 1 before step 10, stops each of two ranks, steps of 0.25 s."""
    clock = Clock()
    stop = StopSignal(clock=clock)
    for step in range(40):
        if rank == 1 and step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.before_step():
            return step, stop.n_between
        clock.now += 0.25
    return None


def test_ranks_look_for_a_signal_every_two_seconds_and_stop_at_the_same_step():
    assert results_on_two_ranks(looks_on_rank_1) == [(14, 8)] * 2      # looks at steps 0, 2, 6, 14


def saves_with_a_clock(rank):
    """At which of 40 steps of 30 s a checkpoint is due every three minutes; the clock of rank 1 is a minute ahead."""
    clock = Clock()
    clock.now += 60 * rank
    stop = StopSignal(save_minutes=3, clock=clock)
    due = []
    for step in range(40):
        stop.before_step()
        if stop.save_is_due:
            due.append(step)
            clock.now += 5 + rank                      # what it takes, by each one's clock
            stop.saved(step)
        clock.now += 30
    return due


def test_a_checkpoint_is_due_at_the_same_steps_on_all_ranks():
    alone = saves_with_a_clock(0)
    assert alone == [6, 12, 18, 24, 30, 36]
    assert results_on_two_ranks(saves_with_a_clock) == [alone, alone]


def test_steps_that_become_slow_are_looked_at_more_often(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, 'rank_of', lambda: (0, 2))
    stop = StopSignal(clock=clock)
    asked = []
    monkeypatch.setattr(training, 'all_gather', lambda look: asked.append(step) or [look, look])
    for step in range(60):
        stop.before_step()
        clock.now += 0.25 if step < 20 else 5.0
    assert asked == [0, 2, 6, 14, *range(22, 60)]


# -----------------------------------------------------------------------------
# the log


def test_the_log_of_a_resumed_run_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path):
    path = tmp_path / 'run' / 'log.jsonl'
    log = Log(path)
    log.write('run', stage='a1')
    for step in (10, 20, 30):
        log.write('step', step=step, loss=1 / step)
    with open(path, 'a') as f:
        f.write('{"kind": "step", "step": 2')          # a kill came here
    log = Log(path, resume_step=20)
    log.write('step', step=25, loss=0.5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {'kind': 'run', 'stage': 'a1'}, {'kind': 'step', 'step': 10, 'loss': 0.1},
        {'kind': 'step', 'step': 20, 'loss': 0.05}, {'kind': 'step', 'step': 25, 'loss': 0.5}]
    Log(path, active=False).write('step', step=1)      # another rank
    assert len(path.read_text().splitlines()) == 4
    for damaged in '[1]', '{"step": 9}', '{"kind": "step", "step": "x"}', '\0\0', '\ud83d', '[' * 100_000:
        lines = path.read_bytes().splitlines()
        path.write_bytes(b'\n'.join([lines[0], damaged.encode(errors='surrogatepass'), *lines[1:]]))
        assert refusal(Log, path, resume_step=20).startswith(f'{path}:2: not a line of a log (')
        path.write_bytes(b'\n'.join(lines))
    log = Log(path)                                    # not a resume: a new log
    assert path.read_text() == ''
    with no_file_larger_than(0):
        assert refusal(log.write, 'step') == f'{path}: cannot write here, is the disk full? ([Errno 27] File too large)'


def test_an_evaluation_that_comes_again_after_a_resume_is_logged_once(tmp_path, monkeypatch):
    """A signal in an evaluation saves its step without it; a resume makes it, and is killed before it saves anew."""
    monkeypatch.setattr(StubWriter, 'shown', {})
    path = tmp_path / 'log.jsonl'
    Log(path).write('step', step=20, loss=1.0)
    for _ in range(3):
        log = Log(path, resume_step=20, evaluated=False, writer=StubWriter)
        log.write('eval', step=20, correct=0.5)
    log.write('eval', step=40, correct=0.25)
    assert [(r['kind'], r['step']) for r in read_lines(path)] == [('step', 20), ('eval', 20), ('eval', 40)]
    assert StubWriter.shown == {('eval/correct', 20): 0.5, ('eval/correct', 40): 0.25}
    Log(path, resume_step=20, evaluated=True)
    assert [(r['kind'], r['step']) for r in read_lines(path)] == [('step', 20), ('eval', 20)]


class StubWriter:
    """SummaryWriter's face; what it hides on resume is hidden as TensorBoard does it: steps from purge_step on."""
    shown = {}

    def __init__(self, folder, purge_step=None):
        Path(folder).mkdir(exist_ok=True)
        for name, step in list(self.shown):
            if purge_step is not None and step >= purge_step:
                del self.shown[name, step]

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.shown, f'{name} has two points at step {step}'
        self.shown[name, step] = value

    def flush(self):
        pass


def test_tensorboard_gets_the_numbers_of_steps_and_evaluations_and_none_twice_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(StubWriter, 'shown', {})
    log = Log(tmp_path / 'log.jsonl', writer=StubWriter)
    log.write('run', stage='a1', n_steps=30)
    for step in (10, 20, 30):
        log.write('step', step=step, loss=1 / step, why='words are not numbers', yes=True)
    log.write('eval', step=20, correct=0.5)
    assert StubWriter.shown == {('step/loss', 10): 0.1, ('step/loss', 20): 0.05, ('step/loss', 30): 1 / 30,
                                ('eval/correct', 20): 0.5}
    log = Log(tmp_path / 'log.jsonl', resume_step=20, writer=StubWriter)   # the checkpoint is of step 20
    log.write('step', step=30, loss=1.0)
    assert StubWriter.shown['step/loss', 30] == 1.0 and StubWriter.shown['step/loss', 20] == 0.05
    Log(tmp_path / 'log.jsonl', active=False, writer=StubWriter).write('step', step=40, loss=1.0)   # another rank
    assert ('step/loss', 40) not in StubWriter.shown
    (tmp_path / 'tensorboard' / 'old').write_text('of a run that saved nothing')
    Log(tmp_path / 'log.jsonl', writer=StubWriter)
    assert not (tmp_path / 'tensorboard' / 'old').exists()


def test_a_tensorboard_that_is_not_installed_ends_the_run_only_when_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)      # as if: importing it raises ImportError
    assert tensorboard_writer(False) is None
    assert refusal(tensorboard_writer, True).startswith('tensorboard = True, but the package tensorboard is not')


# -----------------------------------------------------------------------------
# the meter


def batch_of(n_tokens, *ids):
    return SimpleNamespace(input_ids=[0] * n_tokens, items=list(ids), ids=list(ids))


def test_the_rates_of_a_window_are_those_of_its_steps_without_the_evaluation_between_them():
    """Twenty steps of a second, the loader waited for in a quarter of each, around an evaluation of 100 s."""
    clock = Clock()
    meter = Meter(clock)
    batches = [batch_of(30, 'a', 'b', 'c'), batch_of(10, 'd')]

    def loader():
        while True:
            clock.now += 0.25
            yield batches
    batches_of_steps = loader()
    for window in range(2):                            # the second starts from nothing
        for step in range(20):
            if step == 10 and window == 0:
                meter.pause()
                clock.now += 100
                meter.go_on()
            assert meter.next_of(batches_of_steps) is batches
            clock.now += 0.75
            meter.add(loss=1.0 if step < 10 else 4.0, n_labels=10 if step < 10 else 5, batches=batches)
        record = meter.read(torch.device('cpu'))
        assert record.pop('peak_memory_mb') > 0
        # 100 labels of 1 nat and 50 of 4: by labels, not a mean of the steps' means, which is 2.5
        assert record == {'seconds': 20.0, 'samples_per_s': 4.0, 'tokens_per_s': 40.0, 'labels_per_s': 7.5,
                          'data_wait': 0.25, 'window_loss': 2.0}


def test_a_window_without_a_label_has_a_loss_of_nothing():
    """Every picture of its steps was a bad one, which max_bad_samples allows."""
    clock = Clock()
    meter = Meter(clock)
    clock.now += 1
    meter.add(loss=0.0, n_labels=0, batches=[])
    assert meter.read(torch.device('cpu'))['window_loss'] == 0


# -----------------------------------------------------------------------------
# around an update


def test_an_epoch_is_what_fits_in_its_minutes_at_the_median_time_of_a_step(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training.time, 'perf_counter', clock)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p])

    def forward_backward(seconds):
        clock.now += seconds
        p.grad = torch.ones(1)

    def samples(minutes, steps, global_batch_size, evaluation=0.0, wait=0.0):
        def waited_for():
            for seconds in steps:
                clock.now += wait
                yield seconds

        def evaluate(at_end):
            clock.now += evaluation
        return measure_epoch(waited_for(), forward_backward, optimizer, minutes, global_batch_size, evaluate=evaluate,
                             eval_every=10, eval_time_share=0.05)[0]
    # the first two warm up; 60 s / 0.5 s = 120 steps, by the mean 27
    assert samples(1.0, [99, 98, 0.5, 9.0, 0.375, 0.5, 0.625], 64) == 120 * 64
    assert samples(1.0, [0, 0, 7.0], 10) == 8 * 10     # 8.57 steps: whole ones only
    assert samples(0.01, [0, 0, 2.0], 10) == 10        # at least one
    assert samples(1.0, [0, 0, 0.5], 1, wait=0.25) == 80               # 60 s / 0.75 s
    # 5 s at the start and 5 s for each ten steps of 0.5 s: 55 steps take 27.5 s, their evaluations 32.5 s
    assert samples(1.0, [0, 0, 0.5], 1, evaluation=5.0) == 55
    assert samples(1.0, [0, 0, 0.5], 10, evaluation=70.0) == 10
    assert p.grad is None and p.item() == 0            # nothing was learned or left behind


@pytest.mark.parametrize('evaluation, given, eval_every, n_steps', [
    (10.0, 0, 380, 6821),          # after 190 s of steps 10 s of 200 s; 3,590 s hold 6,821 steps of 0.5 + 10 / 380 s
    (0.0, 0, 1, 7200),
    (10.0, 10, 10, 2393)])         # what is set stays
def test_evaluations_come_as_often_as_their_share_of_the_time_allows(evaluation, given, eval_every, n_steps,
                                                                     monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training.time, 'perf_counter', clock)

    def pass_time(seconds):
        clock.now += seconds

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    measured = measure_epoch([0.5] * 7, pass_time, optimizer, 60.0, 8, evaluate=lambda at_end: pass_time(evaluation),
                             eval_every=given, eval_time_share=0.05)
    assert measured == (8 * n_steps, eval_every)


def parameters(**gradients):
    """Parameters of ones with these gradients, or None."""
    found = {}
    for name, gradient in gradients.items():
        shape = (2,) if gradient is None else torch.tensor(gradient).shape
        found[name] = torch.nn.Parameter(torch.ones(shape))
        found[name].grad = None if gradient is None else torch.tensor(gradient)
    return found


def test_gradient_norms_are_by_group_and_clipping_scales_all_gradients_together():
    trainable = parameters(a_1=[3.0, 0.0], a_2=[[0.0], [4.0]], b=[0.0, 12.0], c=None)
    norms = grad_norms(trainable, {'all of a': 'a', 'b': 'b', 'c': 'c'})
    assert norms == {'all of a': 5.0, 'b': 12.0, 'c': 0.0}
    clip_gradients(trainable, math.hypot(*norms.values()), grad_clip=26.0)     # 13 is below it
    assert trainable['b'].grad.tolist() == [0.0, 12.0]
    clip_gradients(trainable, math.hypot(*norms.values()), grad_clip=6.5)
    torch.testing.assert_close(trainable['a_1'].grad, torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(trainable['b'].grad, torch.tensor([0.0, 6.0]))
    assert trainable['c'].grad is None


def test_a_norm_is_summed_in_float64():
    w = parameters(w=[[4096.0]] + 1000 * [[1.0]])      # float32 would not see a 1 beside 2^24
    assert grad_norms(w, {'w': 'w'})['w'] == math.sqrt(4096 ** 2 + 1000)


@pytest.mark.parametrize('loss, grad_norm', [(math.nan, 1.0), (1.0, math.inf), (math.inf, -math.inf)])
def test_a_step_that_is_not_finite_ends_the_run_and_names_its_samples(loss, grad_norm, tmp_path):
    batches = [batch_of(1, 'a', 'b'), batch_of(1, 'c')]
    assert stop_if_not_finite(3, 1.0, 1.0, batches=batches, out=tmp_path) is None and not any(tmp_path.iterdir())
    assert refusal(stop_if_not_finite, 3, loss, grad_norm, batches=batches, out=tmp_path) == (
        f'step 3: loss {loss}, gradient norm {grad_norm}; stopped before the update, what was saved before is '
        'good. The samples of this step: a, b, c ... (3)')
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'diverged'


def test_an_evaluation_that_is_no_number_is_not_saved(tmp_path):
    assert stop_if_eval_not_finite(3, {'correct': 1.5, 'win_zero': 0.0}, tmp_path) is None
    line = refusal(stop_if_eval_not_finite, 3, {'correct': 1.5, 'zero': math.nan}, out=tmp_path)
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'diverged'
    assert line == 'step 3: zero on the held-out items is nan; stopped without saving, what was saved before is good'


@pytest.mark.parametrize('check, value, right', [
    (require_positive, 0, 1), (require_positive, -1.0, 0.5), (require_positive, math.nan, 3),
    (require_positive, math.inf, 9), (require_not_negative, -1, 0), (require_not_negative, math.nan, 0.5),
    (require_share, -0.1, 0.0), (require_share, 1.5, 1.0), (require_share, math.nan, 0.3)])
def test_a_setting_that_cannot_be_meant_is_named(check, value, right):
    assert check({'seed': 0, 'epochs': right}, 'epochs') is None
    assert refusal(check, {'seed': 0, 'epochs': value}, 'epochs').startswith(f'epochs = {value}: wanted ')


@pytest.mark.parametrize('value', [
    {'i2t': '1'}, {'i2t': None}, {'i2t': True}, {'i2t': -1.0}, {'i2t': math.nan}, (1.0, 'a'), (math.inf,), ([1],)])
def test_a_setting_of_several_numbers_holds_numbers(value):
    assert 'is no number of 0 or more' in refusal(require_numbers, {'task_weights': value}, 'task_weights')
    for right in {'i2t': 1, 'a2t': 0.0}, {}, (1.0, 2), ():
        require_numbers({'task_weights': right}, 'task_weights')


@pytest.mark.parametrize('edges', [(5,), (5, 10, 20), (10, 5), (5, 5), (0, 5), (5.0, 9.0), ('5', '9')])
def test_bucket_edges_are_two_rising_numbers_or_none(edges):
    message = refusal(require_split, {'n_eval': 8, 'bucket_edges': edges})
    assert message.startswith(f'bucket_edges = {edges}: wanted two')
    for right in (), (5, 10):
        require_split({'n_eval': 8, 'bucket_edges': right})


def test_a_gradient_of_zeros_does_not_count_as_one():
    trainable = parameters(zero=[0.0, 0.0], none=None, some=[0.0, 1.0], known=[1.0])
    assert names_with_gradient(trainable, {'known'}) == {'some'}


def test_matrices_decay_vectors_do_not_and_each_prefix_has_its_peak():
    trainable = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in {
        'connector.w': (2, 2), 'connector.b': (2,), 'llm.lora': (2, 1)}.items()}
    groups = parameter_groups(trainable, {'connector.': 0.1, 'llm.': 0.2}, weight_decay=0.01)
    assert [(group['weight_decay'], group['peak']) for group in groups] == [(0.01, 0.1), (0.0, 0.1), (0.01, 0.2)]
    assert [[p.shape for p in group['params']] for group in groups] == [[(2, 2)], [(2,)], [(2, 1)]]


def test_the_hash_of_what_is_frozen_ignores_what_learns_and_the_name_that_lora_gives():
    def model(**values):
        parameters = {name.replace('__', '.'): torch.full((2,), value) for name, value in values.items()}
        return SimpleNamespace(named_parameters=parameters.items)
    frozen = frozen_sha256(model(q__weight=1.0), set())
    assert frozen == frozen_sha256(model(q__base_layer__weight=1.0, lora=5.0), {'lora'})
    assert frozen != frozen_sha256(model(q__base_layer__weight=2.0, lora=5.0), {'lora'})


# -----------------------------------------------------------------------------
# whole runs: what people's files and machines do to them


@pytest.fixture
def a1_command(a1_config, tiny, tmp_path):
    """train_a1.py on pictures of its own, all of which it sees, to tmp_path/out; evaluations at steps 0, 15 and 22."""
    shutil.copytree(tiny / 'captions', tmp_path / 'captions')
    return [run_here, 'train_a1.py', a1_config, f'--data_json={tmp_path}/captions/data.json',
            f'--image_root={tmp_path}/captions/images', f'--out_dir={tmp_path}/out', '--epoch_samples=176',
            '--eval_every=15', '--n_golden=3', '--n_predictions=3']


@pytest.mark.stage
def test_forty_cut_pictures_are_one_list_on_any_number_of_ranks_and_after_a_resume(a1_command, tmp_path, capfd):
    run, *command = a1_command
    pictures = sorted((tmp_path / 'captions' / 'images').iterdir())
    for path in pictures[::5]:
        path.write_bytes(path.read_bytes()[:-20])
    run(*command, '--max_bad_samples=40')
    alone = (tmp_path / 'out' / 'bad_samples.jsonl').read_text()
    assert [json.loads(line)['id'] for line in alone.splitlines()] == [f'captions-{k:06d}' for k in range(0, 200, 5)]
    two = tmp_path / 'two'
    statuses = on_two_ranks(run, *command, f'--out_dir={two}', '--max_bad_samples=40')
    assert statuses[0] == statuses[1] and (two / 'bad_samples.jsonl').read_text() == alone
    shutil.rmtree(two / 'ckpt')                        # as a kill after step 15 would have left it
    assert on_two_ranks(run, *command, f'--out_dir={two}', '--max_bad_samples=40', '--resume=True') == statuses
    assert (two / 'bad_samples.jsonl').read_text() == alone
    capfd.readouterr()
    assert on_two_ranks(run, *command, f'--out_dir={tmp_path}/few', '--max_bad_samples=39') == [1, 1]
    lines = capfd.readouterr().err.splitlines()
    assert any('not a whole image' in line and 'set max_bad_samples above 39' in line for line in lines)


def rewrite_captions(folder):
    text = (folder / 'data.json').read_text()
    (folder / 'data.json').write_text(text.replace('"value": "', '"value": "No. '))


def exchange_pictures(folder):
    """Every picture for another, of the same size in bytes."""
    paths = sorted((folder / 'images').iterdir())
    longest = max(path.stat().st_size for path in paths)
    contents = [path.read_bytes().ljust(longest, b'\0') for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1]):
        path.write_bytes(content)


def take_samples_away(folder):
    records = json.loads((folder / 'data.json').read_text())
    (folder / 'data.json').write_text(json.dumps(records[:-1]))


@pytest.mark.stage
@pytest.mark.parametrize('change, found', [
    (rewrite_captions, "sample 'captions-"), (exchange_pictures, "sample 'captions-"),
    (take_samples_away, 'the number of samples was 200, is 199 now')])
def test_a_run_does_not_go_on_over_changed_data_with_its_split_or_without(a1_command, tmp_path, change, found):
    run, *command = a1_command
    longest = max(path.stat().st_size for path in (tmp_path / 'captions' / 'images').iterdir())
    for path in (tmp_path / 'captions' / 'images').iterdir():
        path.write_bytes(path.read_bytes().ljust(longest, b'\0'))
    command.append('--epoch_samples=8')
    run(*command)
    change(tmp_path / 'captions')
    line, _ = run(*command, '--resume=True')
    assert line.startswith(f'{tmp_path}/out/split.json was chosen from other data') and '\n' not in line
    (tmp_path / 'out' / 'split.json').unlink()
    line, _ = run(*command, '--resume=True')
    assert line.startswith(f'{tmp_path}/out/ckpt was trained on other data: {found}') and '\n' not in line


def run_and_signal_at_evaluation(number, call, run, *command):
    """run(*command), which gets the signal in the middle of its evaluation of this number."""
    from data import Loader
    images = Loader.images
    calls = []

    def images_and_signal(loader, examples):
        calls.append(examples)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return images(loader, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, 'images', images_and_signal)
        return run(*command)


@pytest.mark.stage
@pytest.mark.parametrize('call, line', [
    (2, 'before its first step: nothing was saved'),   # of 8 calls in an evaluation
    (11, 'saved at step 8'), (18, 'saved at step 12'), (24, 'saved at step 12')])
def test_a_signal_during_an_evaluation_leaves_it_and_the_run_goes_on_as_the_same(
        a1_config, a1_run, tmp_path, call, line):
    command = 'train_a1.py', a1_config, f'--out_dir={tmp_path}'
    code, _ = run_and_signal_at_evaluation(signal.SIGTERM, call, run_here, *command)
    assert code.startswith('SIGTERM stopped this run') and line in code
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'stopped'
    assert run_here(*command, '--resume=True')[0] == a1_run.code
    assert_same_run(tmp_path, a1_run.out, tensors=['connector'])


@pytest.mark.stage
def test_ranks_wait_a_day_while_data_is_prepared_and_the_timeout_after_the_first_step(a1_config, tmp_path, monkeypatch):
    minutes = []
    monkeypatch.setattr(WATCH, 'minutes', 24 * 60.0)
    evaluation_of = training.stop_if_eval_not_finite
    monkeypatch.setattr(training, 'stop_if_eval_not_finite', lambda *args: (
        minutes.append(WATCH.minutes), evaluation_of(*args)))
    run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}', '--timeout=7', '--epoch_samples=8')
    assert minutes == [24 * 60.0, 7.0]


@pytest.mark.parametrize('backend', ['nonsense', 'module://matplotlib_inline.backend_inline', 'module://none', 'TkAgg'])
def test_what_a_notebook_left_in_mplbackend_does_not_matter_where_figures_are_drawn(tmp_path, backend):
    (tmp_path / 'log.jsonl').write_text('{"kind": "step", "step": 1, "window_loss": 2.0}\n'
                                        '{"kind": "eval", "step": 1, "zero": 2.0, "input_recall_1": 0.5, '
                                        '"output_recall_1": 0.5}\n')
    code = ('import common, gates\n'
            f'gates.curves("{tmp_path}/log.jsonl", "{tmp_path}/curves.png", ["zero"])\n'
            'from tools.report import chart\n'
            'chart("loss", {"training": ([1], [2.0])})\n')
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, env={**os.environ, 'MPLBACKEND': backend},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'curves.png').exists()
    for path in [*REPO.glob('*.py'), *REPO.glob('small/*.py'), *REPO.glob('tools/*.py')]:
        assert 'pyplot' not in path.read_text().replace('No pyplot', ''), path
