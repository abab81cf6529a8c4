"""common.py: files and checkpoints under kills, damage and a full disk; the lock, seeds, hashes, ranks and progress."""
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import common
from common import (
    Progress, all_gather, all_sum, barrier, finite, from_rank_0, frozen_dtype, gather_in_order, has_checkpoint,
    in_parts, init_ranks, load_checkpoint, lock_run, on_rank_0, one_process_at_a_time, progress, rank_parts,
    read_sealed, reduce_gradients, require_vacant, save_checkpoint, seed_everything, sha256_tensors, shutdown_ranks,
    whole_folder, write_atomic, write_sealed)
from watch import WATCH, say_in_a_line, wait_at_most


def start(function, *args):
    """Run function(*args, send) in a process of its own; returns it and the pipe to hear it on."""
    fork = multiprocessing.get_context('fork')         # a spawned one would import torch for seconds first
    hear, send = fork.Pipe(duplex=False)
    process = fork.Process(target=function, args=(*args, send), daemon=True)
    process.start()
    send.close()
    return process, hear


def start_ranks(function, n=2):
    """[(process, pipe)] of n gloo processes, each of which sends function(rank)."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])

    def run(rank, result):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=port)
        assert init_ranks('cpu') == (rank, n, torch.device('cpu'))
        result.send(function(rank))
        shutdown_ranks()
    return [start(run, rank) for rank in range(n)]


def results_on_two_ranks(function):
    """[what function(rank) returns on each of two gloo processes]."""
    return [hear.recv() for _, hear in start_ranks(function)]   # EOFError if a rank has failed; its traceback is shown


def test_every_script_multiplies_float32_as_float32():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for backend in backends:
        backend.allow_tf32 = True
    init_ranks('cpu')
    assert [backend.allow_tf32 for backend in backends] == [False, False]


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


def refusal(function, *args, **named):
    """The one line that this call exits with."""
    with pytest.raises(SystemExit) as e:
        function(*args, **named)
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
    assert refusal(load_checkpoint, folder).startswith(f'{folder}: no checkpoint here')
    tensors = {'connector': {'w': torch.tensor([1.5, -2.0], dtype=torch.bfloat16)},
               'optimizer': {'state': {0: torch.ones(2)}}}
    save(folder, 1)
    save_checkpoint(folder, tensors, {'step': 2, 'settings': {'learning_rate': 1e-3}})
    loaded, meta, used = load_checkpoint(str(folder))
    assert set(loaded) == {'connector', 'optimizer'}
    assert loaded['connector']['w'].dtype == torch.bfloat16
    assert torch.equal(loaded['connector']['w'], tensors['connector']['w'])
    assert torch.equal(loaded['optimizer']['state'][0], torch.ones(2))
    assert (meta, used) == ({'step': 2, 'settings': {'learning_rate': 1e-3}}, folder)
    assert has_checkpoint(folder)
    assert load(folder.with_name('ckpt.prev')) == (1, 'ckpt.prev')


class Evil:
    def __reduce__(self):
        return os.system, ('touch started',)


def put_pickle(path):
    """A pickle that starts a program, vouched for by the manifest."""
    torch.save({'w': Evil()}, path)
    manifest = json.loads((path.parent / 'manifest.json').read_text())
    manifest[path.name] = common.sha256_file(path)
    (path.parent / 'manifest.json').write_text(json.dumps(manifest))


def put(text):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize('name, harm', [
    ('w.pt', flip), ('meta.json', flip), ('manifest.json', flip), ('w.pt', os.remove), ('w.pt', put_pickle),
    ('manifest.json', put('{}')), ('manifest.json', put('[]')), ('manifest.json', put('null')),
    ('manifest.json', put('[' * 100_000)), ('manifest.json', put('{"meta.json": "", "a\\u0000": ""}'))])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_in_one_line(name, harm, tmp_path, capsys):
    folder = tmp_path / 'ckpt'
    save(folder, 1)
    save(folder, 2)
    harm(folder / name)
    assert load(folder) == (1, 'ckpt.prev')
    line = capsys.readouterr().err
    assert line.startswith(f'{folder}: ') and line.endswith(f': using {folder}.prev\n') and line.count('\n') == 1
    assert not os.path.exists('started')


def test_a_file_in_the_place_of_a_checkpoint_gets_one_line(tmp_path):
    folder = tmp_path / 'ckpt'
    folder.write_text('somebody wrote this')
    assert has_checkpoint(folder) and refusal(load_checkpoint, folder).startswith(f'no whole checkpoint: {folder}: [')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / '.ckpt.tmp').write_text('')
    line = refusal(save, tmp_path / 'other' / 'ckpt', 1)
    assert 'cannot write this checkpoint, something else is in its place' in line and line.endswith('none before it')


def test_a_save_leaves_a_users_own_files_alone(tmp_path):
    (tmp_path / 'ckpt.tmp').mkdir()
    (tmp_path / 'ckpt.tmp' / 'mine').write_text('1')
    save(tmp_path / 'ckpt', 1)
    assert (tmp_path / 'ckpt.tmp' / 'mine').read_text() == '1'


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
    folder = tmp_path / 'ckpt'
    step = 0
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
        def call_or_die(*args, **named):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)
        return call_or_die
    os.replace = deadly(os.replace)
    os.fsync = deadly(os.fsync)
    common.shutil.rmtree = deadly(common.shutil.rmtree)
    save(folder, step)


@pytest.mark.parametrize('damaged', [False, True])
def test_a_kill_at_any_point_of_a_save_leaves_a_checkpoint_even_when_the_newest_was_damaged(damaged, tmp_path):
    names = []
    for call in range(1, 100):
        folder = tmp_path / str(call) / 'ckpt'
        save(folder, 1)
        save(folder, 2)
        if damaged:
            flip(folder / 'w.pt')
        process, _ = start(save_and_die_at, call, folder, 3)
        process.join()
        step, name = load(folder)
        assert step in ((1, 3) if damaged else (2, 3)) and has_checkpoint(folder)
        names.append(name)
        if process.exitcode == 0:                      # the save had fewer calls than that: every one was tried
            break
        second, _ = start(save_and_die_at, 3, folder, 4)
        second.join()
        assert load(folder)[0] in (step, 4)            # what was whole beside its place is not lost by the next kill
    assert (step, name) == (3, 'ckpt') and call > 5 and '.ckpt.tmp' in names


def test_a_full_disk_ends_a_save_in_one_line_and_leaves_the_checkpoint_before_it(tmp_path):
    folder = tmp_path / 'ckpt'
    with no_file_larger_than(20_000):
        line = refusal(save, folder, 1)
    assert line.startswith(f'{folder}: cannot write this checkpoint, is the disk full?')
    assert line.endswith('there is none before it') and not any(tmp_path.iterdir())
    save(folder, 1)
    with no_file_larger_than(20_000):
        assert refusal(save, folder, 2).endswith('the one before it is whole')
    assert load(folder) == (1, 'ckpt')
    save(folder, 2)
    assert load(folder) == (2, 'ckpt') and load(tmp_path / 'ckpt.prev') == (1, 'ckpt.prev')


# -----------------------------------------------------------------------------
# files and folders


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / 'new' / 'split.json'
    write_atomic(path, 'old')
    with no_file_larger_than(20_000):
        assert refusal(write_atomic, path, 'x' * 30_000) == (
            f'{path}: cannot write here, is the disk full? ([Errno 27] File too large)')
    assert path.read_text() == 'old'
    write_atomic(path, b'new')
    assert path.read_text() == 'new'


def test_a_sealed_file_comes_back_and_any_change_of_it_is_refused(tmp_path):
    path = tmp_path / 'index.json'
    write_sealed(path, {'a': [1, 'ü']})
    assert set(json.loads(path.read_text())) == {'a', 'sha256'}
    assert read_sealed(path, 'build.py') == {'a': [1, 'ü']}
    path.write_text(path.read_text().replace('1', '2'))
    assert refusal(read_sealed, path, 'build.py') == (
        f'{path}: its sha256 is not that of its content; remove it and run build.py again')
    path.write_text('[1]')
    assert refusal(read_sealed, path, 'build.py').startswith(f'{path}: not what build.py writes (')
    assert 'No such file or directory' in refusal(read_sealed, tmp_path / 'none.json', 'build.py')


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / 'export'
    with pytest.raises(KeyError), whole_folder(folder) as beside:
        (beside / 'half').write_text('x')
        raise KeyError
    assert not any(tmp_path.iterdir())
    with whole_folder(folder) as beside:
        (beside / 'config.json').write_text('{}')
        (beside / 'config.json').chmod(0o600)
    assert [path.name for path in tmp_path.iterdir()] == ['export']
    assert (folder / 'config.json').stat().st_mode & 0o777 == 0o644
    assert refusal(require_vacant, folder) == f'{folder} is there already and not empty: name another folder'
    (tmp_path / 'empty').mkdir()
    assert require_vacant(tmp_path / 'empty') is None


# -----------------------------------------------------------------------------
# one writer per folder


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


def hold_for_a_moment(path, held):
    with one_process_at_a_time(path, 'counts'):
        held.send(True)
        time.sleep(1.0)


def test_a_process_that_waits_for_another_one_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, 'LOCK_SECONDS', 0.1)
    path = tmp_path / '.lock'
    for line in f'another process counts: waiting for it ({path} is locked)\n', '':
        if line:
            _, held = start(hold_for_a_moment, path)
            assert held.recv()
        with one_process_at_a_time(path, 'counts'):
            assert capsys.readouterr().out == line


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(lock_run, tmp_path / 'file' / 'run') == (
        f'{tmp_path}/file/run: cannot write here (Not a directory); set another out_dir')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_refused_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    assert refusal(lock_run, tmp_path) == f'{tmp_path}: cannot write here (Permission denied); set another out_dir'


# -----------------------------------------------------------------------------
# seeds and hashes


def draws(*key):
    seed_everything(*key)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_numbers_are_a_function_of_the_key():
    first = draws(1, 23, 'x')
    keys = [(1, 23, 'y'), (12, 3, 'x'), (1, 23), (2, 23, 'x')]
    others = [draws(*key) for key in keys]
    assert draws(1, 23, 'x') == first
    for of_one_generator in zip(first, *others):
        assert len(set(of_one_generator)) == 5


def test_the_sha256_of_tensors_is_over_name_shape_dtype_and_bytes():
    w = torch.tensor([1.0, 2.0])
    bytes_of_w = bytes([0, 0, 0x80, 0x3f, 0, 0, 0, 0x40])                       # IEEE 754, little-endian
    assert sha256_tensors([('w', w)]) == hashlib.sha256(b'w (2,) torch.float32' + bytes_of_w).hexdigest()
    assert sha256_tensors([('w', w.double())], dtype=torch.float32) == sha256_tensors([('w', w)])


@pytest.mark.parametrize('dtype, bits', [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_the_sha256_of_tensors_changes_with_one_bit_a_name_a_shape_or_a_dtype(dtype, bits):
    a = torch.arange(6).to(dtype).view(2, 3)
    b = torch.zeros((), dtype=dtype)
    one_bit = (a.view(bits) ^ torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=bits)).view(dtype)
    sha256 = sha256_tensors([('a', a), ('b', b)])
    others = [[('a', one_bit), ('b', b)], [('A', a), ('b', b)], [('a', a.view(3, 2)), ('b', b)], [('a', a)],
              [('a', a.view(bits)), ('b', b)], [('a', a), ('b', b.view(1))], [('b', a), ('a', b)]]
    assert len({sha256, *map(sha256_tensors, others)}) == 8
    assert sha256_tensors([('b', b), ('a', a.t().contiguous().t())]) == sha256      # neither order nor strides count


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


@pytest.mark.parametrize('name, device, multiplies, dtype', [
    ('auto', 'cuda', False, 'bfloat16'), ('auto', 'cpu', True, 'bfloat16'), ('auto', 'cpu', False, 'float32'),
    ('float32', 'cuda', True, 'float32'), ('bfloat16', 'cpu', False, 'bfloat16')])
def test_frozen_weights_are_bfloat16_where_the_device_multiplies_it(name, device, multiplies, dtype, monkeypatch):
    monkeypatch.setattr(common, 'cpu_multiplies_bfloat16', lambda: multiplies)
    assert frozen_dtype(name, torch.device(device)) is getattr(torch, dtype)
    assert refusal(frozen_dtype, 'float16', torch.device(device)) == (
        "dtype = 'float16': wanted auto, bfloat16 or float32")


def test_one_rank_alone_needs_no_collective():
    p = torch.nn.Parameter(torch.zeros(2))
    reduce_gradients([p])
    assert (all_sum(3), all_gather('x'), gather_in_order('ab'), p.grad) == (3.0, ['x'], ['a', 'b'], None)
    assert in_parts('abcde', 2) == ['ab', 'cd', 'e']


def collectives(rank):
    """What one of two ranks has after each collective."""
    a, b, c = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (1,), (3,))]
    a.grad = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]][rank])
    b.grad = None if rank == 0 else torch.tensor([5.0])
    reduce_gradients(iter([a, b, c]))
    return {
        'gradients': (a.grad.tolist(), b.grad.tolist(), c.grad),
        'sum': all_sum([2**24 + 1, 2.5][rank]),
        'gathered': all_gather({'rank': rank, 'ids': 'ab'[:rank + 1]}),
        'in order': gather_in_order('abcde'[rank::2]),
        'few in order': gather_in_order('a'[rank::2]),
        'of rank 0': on_rank_0([3, 1].index, [3, 1][rank]),
        'sent': from_rank_0([{'rank': rank}, rank]),
    }


def test_two_ranks_add_their_gradients_sum_in_float64_and_gather_in_order():
    for found in results_on_two_ranks(collectives):
        # rank 0 had no gradient of b: it counts as zero; nobody had one of c: none, as on a single rank
        assert found['gradients'] == ([[11.0, 22.0], [33.0, 44.0]], [5.0], None)
        assert found['sum'] == 16777219.5              # float32 has no such number
        assert found['gathered'] == [{'rank': 0, 'ids': 'a'}, {'rank': 1, 'ids': 'ab'}]
        assert (found['in order'], found['few in order'], found['of rank 0']) == (list('abcde'), ['a'], 0)
        assert found['sent'] == [{'rank': 0}, 0]


@pytest.mark.parametrize('stopped, wait_for_it', [(0, all_sum), (2, all_sum), (2, lambda _: barrier())])
def test_a_rank_that_is_stopped_ends_the_others_in_a_line_that_names_it(stopped, wait_for_it, capfd):
    def wait(rank):
        all_gather(rank)
        wait_at_most(0.05)
        if rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        return wait_for_it(1)

    ranks = start_ranks(wait, n=3)
    for rank, (process, _) in enumerate(ranks):
        if rank != stopped:
            process.join(30)
            assert process.exitcode == 1
    ranks[stopped][0].kill()
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if 'has waited' in line]
    # one that would have said so later finds the other one gone; torch's store may complain of that in its own lines
    assert said and f'has waited 0.05 min for rank {stopped}: was it stopped' in said[0]
    assert not any('Traceback' in line for line in lines)


@pytest.mark.parametrize('wait_for_it, line', [
    (all_sum, 'rank 0: another rank has ended, its own lines say'),
    (lambda _: barrier(), 'rank 0: rank 1 has ended, its own lines say')])
def test_a_rank_that_ends_ends_the_others_in_one_line(wait_for_it, line, capfd):
    def end(rank):
        all_gather(rank)
        if rank == 1:
            raise SystemExit('its disk is full')
        return wait_for_it(1)

    for process, _ in start_ranks(end):
        process.join(30)
        assert process.exitcode == 1
    lines = sorted(capfd.readouterr().err.splitlines())
    assert lines[0] == 'its disk is full' and lines[1].startswith(line)
    assert len(lines) == 2


@pytest.mark.parametrize('ended', [0, 1])
@pytest.mark.parametrize('how', ['kill', 'raise'])
def test_a_rank_that_waits_where_nothing_tells_it_hears_of_one_that_has_ended(ended, how, capfd):
    """As in NCCL, which does not notice that another one is gone."""
    def wait(rank):
        all_gather(rank)
        if rank == ended:
            if how == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            raise SystemExit('its disk is full')
        with WATCH.collective('cuda'):
            time.sleep(60)

    process, _ = start_ranks(wait)[1 - ended]
    process.join(20)
    assert process.exitcode == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f'rank {1 - ended}')]
    assert said == [f'rank {1 - ended}: rank {ended} has ended, its own lines say why']


def test_after_the_last_line_of_a_script_nothing_is_said(capfd):
    def outlive_the_ranks(rank):
        shutdown_ranks()
        time.sleep(2.5)                                # the threads look once in a second
        return rank

    assert results_on_two_ranks(outlive_the_ranks) == [0, 1]
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('working', [0, 1])
def test_a_rank_is_waited_for_in_the_store_while_it_works_however_long_that_takes(working, capfd):
    def work(rank):
        all_gather(rank)
        wait_at_most(0.02)                             # 1.2 s
        if rank == working:
            time.sleep(3)
        barrier()
        return all_sum(rank)

    assert results_on_two_ranks(work) == [1.0, 1.0]
    assert capfd.readouterr().err == ''


def test_what_gloo_raises_inside_of_a_model_is_one_line_and_anything_else_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_rank', lambda: 3)
    for e in RuntimeError('[third_party/gloo/tcp/pair.cc:553] Connection closed\nby peer'), RuntimeError('a shape'):
        say_in_a_line(type(e), e, None)
    assert capsys.readouterr().err == (
        'rank 3: another rank has ended, its own lines say why ([third_party/gloo/tcp/pair.cc:553] Connection closed)\n'
        'RuntimeError: a shape\n')


def test_on_a_gpu_hosts_talk_over_gloo_and_devices_over_nccl(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', asked.append)
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, timeout: asked.append(backend))
    monkeypatch.setattr(WATCH, 'start', lambda: None)
    for name, value in ('RANK', '1'), ('LOCAL_RANK', '1'), ('WORLD_SIZE', '2'):
        monkeypatch.setenv(name, value)
    assert init_ranks('cuda') == (1, 2, torch.device('cuda:1')) and asked == ['cuda:1', 'cpu:gloo,cuda:nccl']


def parts_asked_for(rank):
    asked = []
    common.BETWEEN_BATCHES.append(lambda: asked.append(all_sum(1)))
    return [list(part) for part in rank_parts(range(5), 1, rank, 2)], asked


def test_ranks_with_fewer_parts_of_an_evaluation_are_asked_as_often():
    assert results_on_two_ranks(parts_asked_for) == [([[0], [2], [4]], [2.0] * 3), ([[1], [3]], [2.0] * 3)]
    assert list(rank_parts('abcde', 2, 0, 1)) == ['ab', 'cd', 'e']


# -----------------------------------------------------------------------------
# progress


class Clock:
    """Time that passes when it is told to."""
    now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_progress_is_a_plain_line_every_half_minute(capsys):
    clock = Clock()
    shown = Progress(2000, 'llm', clock=clock)
    silent = Progress(2000, 'llm', active=False, clock=clock)
    for _ in range(90):
        clock.now += 0.75
        shown.update(5, loss=1.234567)
        silent.update(5, loss=1.234567)
    shown.close()
    silent.write('nothing')
    assert capsys.readouterr() == (
        'llm: step 200 of 2,000, loss 1.235, about 5 min left\n'
        'llm: step 400 of 2,000, loss 1.235, about 4 min left\n', '')


def test_time_left_is_that_of_the_steps_of_this_start_and_a_written_line_puts_the_next_one_off(capsys):
    clock = Clock()
    shown = Progress(100, 'a1', initial=90, clock=clock)    # resumed at 90
    clock.now = 25
    shown.write('evaluated')
    clock.now = 40
    shown.update()
    clock.now = 60
    shown.update(4)
    assert capsys.readouterr().out == 'evaluated\na1: step 95 of 100, about 60 s left\n'


def test_progress_ends_at_its_end_though_the_ranks_had_unlike_parts(capsys):
    """3 shards on 2 ranks: the first makes two, and counts the other's as well."""
    clock = Clock()
    shown = Progress(3, 'shards', clock=clock)
    for _ in range(2):
        clock.now += 31
        shown.update(2)
    assert capsys.readouterr().out == (
        'shards: step 2 of 3, about 16 s left\nshards: step 3 of 3, about 0 s left\n')


def test_what_is_no_number_is_null_in_json():
    value = {'a': [math.nan, 1.5, (math.inf, -math.inf)], 'b': {'c': np.float64('nan'), 'd': 'nan', 'e': True}}
    assert finite(value) == {'a': [None, 1.5, [None, None]], 'b': {'c': None, 'd': 'nan', 'e': True}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_a_bar_and_lines_stand_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(progress('abc', 'sounds')) == ['a', 'b', 'c']
    assert 'sounds: 100%' in sys.stderr.getvalue() and '3/3' in sys.stderr.getvalue()
    shown = Progress(4, 'llm')
    shown.update(2, loss=1.5)
    shown.write('half of it')
    shown.close()
    assert 'loss=1.5' in sys.stderr.getvalue() and '2/4' in sys.stderr.getvalue()
    assert capsys.readouterr().out == 'half of it\n'
    list(progress('abc', 'other rank', active=False))
    assert 'other rank' not in sys.stderr.getvalue()
