"""common.py: checkpoints under kills, damage and a full disk; lock, signals and log; seeds, hashes and two ranks."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import (Log, StopSignal, all_gather, all_sum, check_resumable, epoch_samples_for, frozen_dtype,
                    has_checkpoint, init_ranks, load_checkpoint, lock_run, reduce_gradients, save_checkpoint,
                    seed_everything, sha256_tensors, tensorboard_writer, write_atomic)


def start(function, *args):
    """Run function(*args, send) in a process of its own; returns it and the pipe to hear it on."""
    fork = multiprocessing.get_context('fork')         # a spawned one would import torch for seconds first
    hear, send = fork.Pipe(duplex=False)
    process = fork.Process(target=function, args=(*args, send), daemon=True)
    process.start()
    send.close()
    return process, hear


def save(folder, step):
    """A checkpoint that knows its step in its tensor and in its meta."""
    save_checkpoint(folder, {'w': torch.full((20_000,), float(step))}, {'step': step})


def load(folder):
    """The step of the checkpoint that loads, and the folder it came from."""
    tensors, meta, used = load_checkpoint(folder)
    assert tensors['w'].tolist() == [meta['step']] * 20_000
    return meta['step'], used.name


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refusal(function, *args):
    with pytest.raises(SystemExit) as e:
        function(*args)
    assert '\n' not in e.value.code
    return e.value.code


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """As a full disk: a write beyond n_bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -----------------------------------------------------------------------------
# checkpoints


def test_a_checkpoint_comes_back_as_it_was_saved_and_keeps_the_one_before(tmp_path):
    folder = tmp_path / 'run' / 'ckpt'
    assert not has_checkpoint(folder)
    tensors = {'connector': {'w': torch.tensor([1.5, -2.0], dtype=torch.bfloat16)},
               'optimizer': {'state': {0: torch.ones(2)}}}
    save(folder, 1)
    save_checkpoint(folder, tensors, {'step': 2, 'settings': {'learning_rate': 1e-3}})
    loaded, meta, used = load_checkpoint(str(folder))
    assert set(loaded) == {'connector', 'optimizer'} and loaded['connector']['w'].dtype == torch.bfloat16
    assert torch.equal(loaded['connector']['w'], tensors['connector']['w'])
    assert torch.equal(loaded['optimizer']['state'][0], torch.ones(2))
    assert (meta, used) == ({'step': 2, 'settings': {'learning_rate': 1e-3}}, folder)
    assert has_checkpoint(folder) and load(folder.with_name('ckpt.prev')) == (1, 'ckpt.prev')


@pytest.mark.parametrize('name', ['w.pt', 'meta.json', 'manifest.json'])
@pytest.mark.parametrize('harm', [flip, os.remove])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(name, harm, tmp_path, capsys):
    folder = tmp_path / 'ckpt'
    save(folder, 1)
    save(folder, 2)
    harm(folder / name)
    assert load(folder) == (1, 'ckpt.prev')
    said = capsys.readouterr().err
    assert said.startswith(f'{folder}: ') and said.endswith(f': using {folder}.prev\n') and said.count('\n') == 1
    if harm is flip and name == 'w.pt':
        assert said == f'{folder}: sha256 of w.pt differs from the manifest: using {folder}.prev\n'


def test_two_damaged_checkpoints_are_refused_in_one_line_that_names_both(tmp_path):
    folder = tmp_path / 'ckpt'
    save(folder, 1)
    save(folder, 2)
    flip(folder / 'w.pt')
    os.remove(tmp_path / 'ckpt.prev' / 'manifest.json')
    assert refusal(load_checkpoint, folder) == (
        f'no whole checkpoint: {folder}: sha256 of w.pt differs from the manifest; '
        f"{folder}.prev: [Errno 2] No such file or directory: '{folder}.prev/manifest.json'")


def save_forever(folder, step, saved):
    while True:
        save(folder, step)
        saved.send(step)
        step += 1


def test_kill_9_while_saving_always_leaves_the_last_saved_checkpoint_or_the_next(tmp_path):
    folder, step = tmp_path / 'ckpt', 0
    for kill in range(8):
        process, saved = start(save_forever, folder, step + 1)
        last = saved.recv()
        time.sleep(0.0013 * kill)                      # a save takes a few ms: each kill meets another place in it
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                last = saved.recv()
        step, _ = load(folder)
        assert process.exitcode == -signal.SIGKILL and step in (last, last + 1)


def save_and_die_at(call, folder, step, _):
    """Save, but be killed before the n-th of the calls that move, remove or flush a file."""
    calls = iter(range(1, 1000))

    def deadly(function):
        return lambda *args, **how: os.kill(os.getpid(), 9) if next(calls) == call else function(*args, **how)
    os.replace, os.fsync, common.shutil.rmtree = map(deadly, (os.replace, os.fsync, common.shutil.rmtree))
    save(folder, step)


@pytest.mark.parametrize('damaged', [False, True])
def test_a_kill_at_any_point_of_a_save_leaves_a_checkpoint_even_when_the_newest_was_damaged(damaged, tmp_path):
    for call in range(1, 100):
        folder = tmp_path / str(call) / 'ckpt'
        save(folder, 1)
        save(folder, 2)
        if damaged:
            flip(folder / 'w.pt')
        process, _ = start(save_and_die_at, call, folder, 3)
        process.join()
        step, _ = load(folder)
        assert step in ((1, 3) if damaged else (2, 3))
        if process.exitcode == 0:                      # the save had fewer calls than that: every one was tried
            break
    assert step == 3 and call > 5


@pytest.mark.parametrize('text', [False, True])
def test_a_full_disk_leaves_the_old_file_good_and_the_next_save_works(text, tmp_path):
    folder = tmp_path / 'ckpt'
    save(folder, 1)
    write_atomic(tmp_path / 'split.json', 'old')
    with no_file_larger_than(20_000), pytest.raises(SystemExit, match='is the disk full'):
        write_atomic(tmp_path / 'split.json', 'x' * 30_000) if text else save(folder, 2)
    assert load(folder) == (1, 'ckpt') and (tmp_path / 'split.json').read_text() == 'old'
    save(folder, 2)
    assert load(folder) == (2, 'ckpt') and load(tmp_path / 'ckpt.prev') == (1, 'ckpt.prev')


def test_a_full_disk_is_said_in_one_line(tmp_path):
    with no_file_larger_than(20_000):
        message = refusal(save, tmp_path / 'ckpt', 1)
    assert message.startswith(f'{tmp_path / "ckpt"}: cannot write this checkpoint, is the disk full?')
    assert message.endswith('there is none before it') and not any(tmp_path.iterdir())
    save(tmp_path / 'ckpt', 1)
    with no_file_larger_than(20_000):
        assert refusal(save, tmp_path / 'ckpt', 2).endswith('the one before it is whole')
    with no_file_larger_than(0):
        message = refusal(Log(tmp_path / 'log.jsonl').write, 'step')
    assert message == f'{tmp_path / "log.jsonl"}: cannot write here, is the disk full? ([Errno 27] File too large)'


def test_resuming_names_the_first_setting_that_differs_and_forgives_those_of_the_machine():
    a, b, had = 'a' * 64, 'b' * 64, {'batch_size': 4, 'bucket_edges': [10, 20], 'n_image': 8192, 'seed': 1}
    meta = {'settings': {**had, 'tensorboard': False}, 'frozen_sha256': a}
    now = {**had, 'batch_size': 8, 'bucket_edges': (10, 20), 'tensorboard': True}
    assert check_resumable(meta, now, a, 'out/ckpt') is None
    assert refusal(check_resumable, meta, {**now, 'n_image': 16384, 'seed': 2}, a, 'out/ckpt') == (
        'out/ckpt has n_image = 8192, this run has 16384: cannot resume')
    assert refusal(check_resumable, meta, now, b, 'out/ckpt') == (
        'out/ckpt was trained on other frozen weights (sha256 aaaaaaaaaaaa, this run has bbbbbbbbbbbb): cannot resume')


# -----------------------------------------------------------------------------
# the run


def hold_lock(out_dir, held):
    lock = lock_run(out_dir)
    held.send(lock.is_locked)
    time.sleep(600)


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    out_dir = tmp_path / 'new' / 'run'
    first, held = start(hold_lock, out_dir)
    assert held.recv()
    assert refusal(lock_run, out_dir) == f'{out_dir}: another run is writing here; wait for it or set another out_dir'
    first.kill()
    first.join()
    assert lock_run(out_dir).is_locked                 # a killed run leaves its .lock file behind, but not the lock


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(lock_run, tmp_path / 'file' / 'run') == (
        f'{tmp_path}/file/run: cannot write here (Not a directory); set another out_dir')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_refused_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    assert refusal(lock_run, tmp_path) == f'{tmp_path}: cannot write here (Permission denied); set another out_dir'


@pytest.fixture
def handlers():
    """Put the signal handlers back after a test."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


def test_a_signal_is_noted_and_a_second_ctrl_c_ends_at_once(handlers):
    stop = StopSignal()
    assert not stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop and stop.name == 'SIGTERM'
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop and stop.name == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


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
    Log(path)                                          # not a resume: a new log
    assert path.read_text() == ''


class StubWriter:
    """SummaryWriter's face; what it hides on resume is hidden as TensorBoard does it: steps from purge_step on."""
    shown, flushed = {}, 0

    def __init__(self, folder, purge_step=None):
        Path(folder).mkdir(exist_ok=True)
        for key in [k for k in self.shown if purge_step is not None and k[1] >= purge_step]:
            del self.shown[key]

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.shown, f'{name} has two points at step {step}'
        self.shown[name, step] = value

    def flush(self):
        StubWriter.flushed += 1


def test_tensorboard_gets_the_numbers_of_steps_and_evaluations_and_none_twice_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(StubWriter, 'shown', {})
    log = Log(tmp_path / 'log.jsonl', writer=StubWriter)
    log.write('run', stage='a1', n_steps=30)
    for step in (10, 20, 30):
        log.write('step', step=step, loss=1 / step, why='words are not numbers', yes=True)
    log.write('eval', step=20, correct=0.5)
    assert StubWriter.shown == {('step/loss', 10): 0.1, ('step/loss', 20): 0.05, ('step/loss', 30): 1 / 30,
                                ('eval/correct', 20): 0.5} and StubWriter.flushed == 4
    log = Log(tmp_path / 'log.jsonl', resume_step=20, writer=StubWriter)   # the checkpoint is of step 20
    log.write('step', step=30, loss=1.0)
    assert StubWriter.shown['step/loss', 30] == 1.0 and StubWriter.shown['step/loss', 20] == 0.05
    Log(tmp_path / 'log.jsonl', active=False, writer=StubWriter).write('step', step=40, loss=1.0)   # another rank
    assert ('step/loss', 40) not in StubWriter.shown
    (tmp_path / 'tensorboard' / 'old').write_text('of a run that saved nothing')
    Log(tmp_path / 'log.jsonl', writer=StubWriter)
    assert not (tmp_path / 'tensorboard' / 'old').exists()


def test_a_tensorboard_that_is_not_installed_is_said_in_one_line_only_when_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)      # as if: importing it raises ImportError
    assert tensorboard_writer(False) is None
    assert refusal(tensorboard_writer, True).startswith('tensorboard = True, but the package tensorboard is not')


def test_an_epoch_is_what_fits_in_the_minutes_at_the_median_step_time():
    assert epoch_samples_for(1.0, [0.5, 9.0, 0.4, 0.5, 0.6], 64) == 120 * 64    # 60 s / 0.5 s; by the mean 27 steps
    assert epoch_samples_for(1.0, [7.0], 10) == 8 * 10                          # 8.57 steps: whole ones only
    assert epoch_samples_for(0.01, [2.0], 10) == 10                             # at least one


def draws(*key):
    seed_everything(*key)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_numbers_are_a_function_of_the_key():
    first = draws(1, 23, 'x')
    others = [draws(1, 23, 'y'), draws(12, 3, 'x'), draws(1, 23), draws(2, 23, 'x')]
    assert draws(1, 23, 'x') == first
    assert all(len({numbers[i] for numbers in (first, *others)}) == 5 for i in range(3))


def test_the_sha256_of_tensors_is_over_name_shape_dtype_and_bytes():
    w = torch.tensor([1.0, 2.0])
    bytes_of_w = bytes([0, 0, 0x80, 0x3f, 0, 0, 0, 0x40])                       # IEEE 754, little-endian
    assert sha256_tensors([('w', w)]) == hashlib.sha256(b'w (2,) torch.float32' + bytes_of_w).hexdigest()


@pytest.mark.parametrize('dtype, bits', [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_the_sha256_of_tensors_changes_with_one_bit_a_name_a_shape_or_a_dtype(dtype, bits):
    a, b = torch.arange(6).to(dtype).view(2, 3), torch.zeros((), dtype=dtype)
    one_bit = (a.view(bits) ^ torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=bits)).view(dtype)
    sha = sha256_tensors([('a', a), ('b', b)])
    others = [[('a', one_bit), ('b', b)], [('A', a), ('b', b)], [('a', a.view(3, 2)), ('b', b)], [('a', a)],
              [('a', a.view(bits)), ('b', b)], [('a', a), ('b', b.view(1))], [('b', a), ('a', b)]]
    assert len({sha, *map(sha256_tensors, others)}) == 8
    assert sha256_tensors({'b': b, 'a': a.t().contiguous().t()}.items()) == sha    # neither order nor strides count


# -----------------------------------------------------------------------------
# ranks


def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert refusal(init_ranks, 'cuda') == (
        'device = \'cuda\', but this machine shows no CUDA device: set device = "cpu" or "auto"')
    assert refusal(init_ranks, 'tpu') == "device = 'tpu': wanted auto, cpu or cuda"
    assert init_ranks('auto') == (0, 1, torch.device('cpu'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert refusal(init_ranks, 'cuda') == 'rank 1 has no GPU: this machine shows 1; lower --nproc_per_node'


@pytest.mark.parametrize('name, device, dtype', [('auto', 'cpu', torch.float32), ('auto', 'cuda', torch.bfloat16),
                                                 ('bfloat16', 'cpu', torch.bfloat16)])
def test_the_dtype_of_frozen_weights_follows_the_device_unless_named(name, device, dtype):
    assert frozen_dtype(name, torch.device(device)) is dtype
    assert refusal(frozen_dtype, 'float16', torch.device(device)) == (
        "dtype = 'float16': wanted auto, bfloat16 or float32")


def test_one_rank_alone_needs_no_collective():
    p = torch.nn.Parameter(torch.zeros(2))
    reduce_gradients([p])
    assert (all_sum(3), all_gather('x'), p.grad) == (3.0, ['x'], None)


def collectives(rank, port, result):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    assert init_ranks('cpu') == (rank, 2, torch.device('cpu'))
    a, b, c = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (1,), (3,)))
    a.grad = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]][rank])
    b.grad = None if rank == 0 else torch.tensor([5.0])
    reduce_gradients(iter([a, b, c]))
    stop = StopSignal()
    before = bool(stop)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    result.send({'a': a.grad.tolist(), 'b': b.grad.tolist(), 'c': c.grad if c.grad is None else c.grad.tolist(),
                 'sum': all_sum([2**24 + 1, 2.5][rank]), 'gathered': all_gather({'rank': rank, 'ids': 'ab'[:rank + 1]}),
                 'stopped': (before, bool(stop), stop.name)})
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_ranks():
    """What two gloo processes have after each collective."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    ranks = [start(collectives, rank, port) for rank in range(2)]
    return [hear.recv() for _, hear in ranks]          # EOFError if a rank has failed; its traceback is in the output


def test_gradients_are_added_over_the_ranks_and_a_missing_one_counts_as_zero(two_ranks):
    assert [(r['a'], r['b']) for r in two_ranks] == [([[11.0, 22.0], [33.0, 44.0]], [5.0])] * 2


def test_a_parameter_without_a_gradient_on_any_rank_has_none_as_on_a_single_rank(two_ranks):
    assert [r['c'] for r in two_ranks] == [None, None]


def test_sums_are_in_float64_and_gathering_is_in_rank_order(two_ranks):
    assert [r['sum'] for r in two_ranks] == [16777219.5] * 2                    # float32 has no such number
    assert [r['gathered'] for r in two_ranks] == [[{'rank': 0, 'ids': 'a'}, {'rank': 1, 'ids': 'ab'}]] * 2


def test_a_signal_on_one_rank_stops_them_all(two_ranks):
    assert [r['stopped'] for r in two_ranks] == [(False, True, ''), (False, True, 'SIGTERM')]
