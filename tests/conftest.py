"""
What the tests share: ways to run a script, what a run has written, and a few runs of the training scripts over tiny
worlds. A world or a run is made when a test first asks for it, once for all processes of pytest -n.
"""
import contextlib
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ['HF_HUB_OFFLINE'] = '1'                     # before transformers is imported: no network, no waiting for it
torch.set_num_threads(1)                               # two processes share two cores; results do not depend on it
HAS_GPU = torch.cuda.is_available()
torch.cuda.is_available = lambda: False                # for all but test_cuda.py: every machine gives the same numbers

# -----------------------------------------------------------------------------
# ways to run a script; a process of its own costs five seconds of imports


def run_script(script, *args, ranks=1, **options):
    """Run a script as a user would, with torchrun when ranks > 1; returns the CompletedProcess, its output as text."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(REPO)}
    command = [*launch, script, *map(str, args)]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, **options)


def run_here(script, *args):
    """Run a script in this process, from the repository's root; returns (exit status or message, what it printed)."""
    from common import BETWEEN_BATCHES
    from training import HELD_LOCKS
    argv = sys.argv
    path = list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    sys.argv = [str(script), *map(str, args)]
    printed = io.StringIO()
    code = 0
    try:
        with contextlib.chdir(REPO), contextlib.redirect_stdout(printed):
            runpy.run_path(str(REPO / script), run_name='__main__')
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
        sys.path[:] = path
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        while HELD_LOCKS:
            HELD_LOCKS.pop().release()
        BETWEEN_BATCHES.clear()
    return code, printed.getvalue()


@pytest.fixture(name='run_here')
def run_here_as_fixture():
    return run_here


def run_with_stubs(script, *args):
    """run_here, with codecs that can be worked out by hand in the place of real ones."""
    import uti
    from tiny_worlds import TinyUTI
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uti, 'UTI', TinyUTI)
        return run_here(script, *args)


def run_until(step, number, run, *command):
    """run(*command), a training script, which gets the signal of this number when it has taken so many steps here."""
    from training import Meter
    add = Meter.add
    steps = []

    def add_and_signal(meter, *args):
        add(meter, *args)
        steps.append(args)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, 'add', add_and_signal)
        return run(*command)


def in_children(function, *args, environments=({},)):
    """Call function(*args), which runs a script, in children of this process, which have torch already: one for each of
    these changes of the environment, all at once. Returns their exit codes."""
    def child(changes):
        os.environ.update(changes)
        code, _ = function(*args)
        sys.exit(code)

    context = multiprocessing.get_context('fork')
    children = [context.Process(target=child, args=(changes,)) for changes in environments]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=120)
        process.kill()                                 # a rank waits for ever when the other one has failed
        process.join()
    return [process.exitcode for process in children]


def on_two_ranks(function, *args):
    return on_ranks(2, function, *args)


def on_ranks(n, function, *args):
    """The same in n children, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    shared = {'WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    ranks = [{**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(n)]
    return in_children(function, *args, environments=ranks)


# -----------------------------------------------------------------------------
# what a run has written


class Run(NamedTuple):
    """A script that has been run: its out dir, its exit status or message, what it printed."""
    out: Path
    code: int
    printed: str


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_log(out_dir, kind='step'):
    """The records of one kind in out_dir/log.jsonl."""
    return [record for record in read_lines(Path(out_dir) / 'log.jsonl') if record['kind'] == kind]


def read_gates(out_dir):
    """{name: gate} of out_dir/gates.json."""
    return {gate['name']: gate for gate in read_json(out_dir / 'gates.json')['gates']}


def failed_gates(out_dir):
    return {name for name, gate in read_gates(out_dir).items() if not gate['passed']}


def read_checkpoint(out_dir, name):
    """The tensors of out_dir/ckpt/name.pt."""
    return torch.load(out_dir / 'ckpt' / f'{name}.pt', weights_only=True)


def assert_same(a, b):
    """The same tensors, to the last bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(out, other, tensors, keys=('step', 'loss', 'grad_norm', 'lr')):
    """The same run to the last bit: its log, evaluations, gates and these tensors of its checkpoint."""
    for key in keys:
        assert [record[key] for record in read_log(out)] == [record[key] for record in read_log(other)], key
    assert read_log(out, 'eval') == read_log(other, 'eval')
    assert read_json(out / 'gates.json') == read_json(other / 'gates.json')
    for name in tensors:
        assert_same(read_checkpoint(out, name), read_checkpoint(other, name))


def assert_close_run(out, other, keys, rtol=1e-3):
    """These numbers of each step, and the held-out losses, are those of `other` but for sums in another order."""
    wanted = {record['step']: record for record in read_log(other)}
    for record in read_log(out):
        for key in keys:
            assert record[key] == pytest.approx(wanted[record['step']][key], rel=rtol), key
    wanted = {record['step']: record for record in read_log(other, 'eval')}
    for record in read_log(out, 'eval'):
        for name, value in wanted[record['step']].items():
            if name != 'kind' and 'win' not in name and 'right' not in name:
                assert record[name] == pytest.approx(value, rel=rtol, abs=1e-5), name     # a share may be near 0


def back_at_checkpoint(out_dir, folder):
    """A copy of a finished run as a kill would have left it after its last checkpoint but one."""
    shutil.copytree(out_dir, folder)
    shutil.rmtree(folder / 'ckpt')                     # ckpt.prev is that one
    return folder


def damage(path):
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def alter_weights(folder):
    """Change the language model in this folder a little; it stays a whole one."""
    weights = load_file(folder / 'model.safetensors')
    weights['model.norm.weight'] += 1e-3
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


# -----------------------------------------------------------------------------
# made once


def build_once(tmp_path_factory, name, build):
    """The folder of this name, filled by build(folder) in the process that comes first."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent                             # the processes of one pytest -n share it
    folder = root / name
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            folder.mkdir()
            build(folder)
    return folder


def run_once(tmp_path_factory, name, run, *command):
    """The Run of run(*command), made in the process that comes first."""
    def build(folder):
        result = run(*command, f'--out_dir={folder}/out')
        (folder / 'result.json').write_text(json.dumps(result))

    folder = build_once(tmp_path_factory, name, build)
    return Run(folder / 'out', *read_json(folder / 'result.json'))


def write_config(path, **settings):
    """A config file."""
    with open(path, 'w') as f:
        for name, value in settings.items():
            value = str(value) if isinstance(value, Path) else value
            f.write(f'{name} = {value!r}\n')
    return path


# -----------------------------------------------------------------------------
# short runs of Track A, in a world that they learn little about


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """captions/, instruct/, text/, llm/ and vision/."""
    from tiny_worlds import make_tiny
    return build_once(tmp_path_factory, 'tiny', make_tiny)


# of a run that has learned next to nothing
LENIENT = {'gate_share_removed': -9.0, 'gate_input_recall': -1.0, 'gate_output_recall': -1.0, 'gate_win': 0.0,
           'gate_distinct': 0.0, 'gate_commonest': 1.0, 'gate_malformed': 1.0, 'gate_own_truth': -1.0}
# the scripts' own, but for the recall: a guess is right in one of four, there are only four colours
BARS = ['--gate_share_removed=0.35', '--gate_input_recall=0.6', '--gate_output_recall=0.6', '--gate_win=0.8',
        '--gate_distinct=0.5', '--gate_commonest=0.1', '--gate_malformed=0.1', '--gate_own_truth=0.05']
TINY = {'device': 'cpu', 'dtype': 'float32', 'log_every': 1, 'max_new_tokens': 4}


@pytest.fixture(scope='session')
def a1_config(tiny, tmp_path_factory):
    """12 steps of 8 captions, evaluated at steps 0, 8 and 12."""
    return write_config(
        tmp_path_factory.mktemp('a1') / 'a1_tiny.py', **TINY, data_json=tiny / 'captions' / 'data.json',
        image_root=tiny / 'captions' / 'images', llm=tiny / 'llm', vision=tiny / 'vision', num_image_tokens=4,
        connector_width=32, connector_depth=1, connector_heads=2, max_seq_len=128, global_batch_size=8,
        micro_batch_size=8, learning_rate=2e-2, epoch_samples=96, eval_every=8, n_eval=24, n_golden=9, n_predictions=4,
        gate_ablation_nats=-9.0, **LENIENT)


@pytest.fixture(scope='session')
def a1_run(a1_config, tmp_path_factory):
    """A run that passes its gates, of which this config asks little."""
    return run_once(tmp_path_factory, 'a1_run', run_here, 'train_a1.py', a1_config)


@pytest.fixture(scope='session')
def a2_config(tiny, a1_run, tmp_path_factory):
    """8 steps of 8 chats, no dropout, evaluated at steps 0, 5 and 8."""
    return write_config(
        tmp_path_factory.mktemp('a2') / 'a2_tiny.py', **TINY, data_json=tiny / 'instruct' / 'data.json',
        image_root=tiny / 'instruct' / 'images', align_dir=a1_run.out, text_jsonl=tiny / 'text' / 'eval.jsonl',
        lora_r=4, lora_dropout=0.0, max_seq_len=320, global_batch_size=8, micro_batch_size=8, learning_rate=1e-3,
        lora_learning_rate=5e-3, epoch_samples=64, eval_every=5, n_eval=24, n_golden=6, n_text=40, n_predictions=3,
        bucket_edges=(25, 50))


@pytest.fixture(scope='session')
def a2_run(a2_config, tmp_path_factory):
    """A run that fails two of its gates."""
    return run_once(tmp_path_factory, 'a2_run', run_here, 'train_a2.py', a2_config)


# -----------------------------------------------------------------------------
# runs that learn, in a world that is easy enough


@pytest.fixture(scope='session')
def colours(tiny, tmp_path_factory):
    """llm/, pictures/ and shards/."""
    from tiny_worlds import make_colours
    return build_once(tmp_path_factory, 'colours', lambda folder: make_colours(folder, tiny))


@pytest.fixture(scope='session')
def a1_colours(a1_config, colours, tmp_path_factory):
    """A run of A1 that has learned to see: 60 steps. The seed decides whether zeros cost more than another image: a
    connector that is sure of a wrong colour loses more by it, and does with two seeds of three."""
    return run_once(
        tmp_path_factory, 'a1_colours', run_here, 'train_a1.py', a1_config, f'--llm={colours}/llm',
        f'--data_json={colours}/pictures/captions.json', f'--image_root={colours}/pictures', '--learning_rate=5e-3',
        '--epoch_samples=480', '--eval_every=50', '--n_eval=40', '--n_golden=3', '--n_predictions=24',
        '--gate_ablation_nats=1.0', '--seed=3', *BARS)


@pytest.fixture(scope='session')
def a2_colours(a2_config, a1_colours, colours, tmp_path_factory):
    """A run of A2 that answers: 60 steps."""
    text = colours / 'pictures' / 'text.jsonl'
    return run_once(
        tmp_path_factory, 'a2_colours', run_here, 'train_a2.py', a2_config, f'--align_dir={a1_colours.out}',
        f'--data_json={colours}/pictures/chats.json', f'--image_root={colours}/pictures', f'--text_jsonl={text}',
        f'--replay_jsonl={text}', '--bucket_edges=(3,50)', '--epoch_samples=480', '--eval_every=50', '--n_eval=48',
        '--n_predictions=24', *BARS)


@pytest.fixture(scope='session')
def b3_config(tiny, colours, tmp_path_factory):
    """80 steps of 16 examples, evaluated at steps 0, 70 and 80. Few of them write: that is left to B4."""
    return write_config(
        tmp_path_factory.mktemp('b3') / 'b3_tiny.py', **TINY, shards_dir=colours / 'shards',
        llm=colours / 'llm', image_codec='stub', audio_codec='stub', text_jsonl=tiny / 'text' / 'eval.jsonl',
        task_weights={'i2t': 2.0, 'a2t': 2.0, 't2i': 0.05, 't2a': 0.05}, max_seq_len=32, global_batch_size=16,
        micro_batch_size=16, learning_rate=2e-2, epoch_samples=1280, eval_every=70, n_golden=4, n_text=6,
        gate_shuffled_win=0.6)


@pytest.fixture(scope='session')
def b3_run(b3_config, tmp_path_factory):
    return run_once(tmp_path_factory, 'b3_run', run_with_stubs, 'train_b3.py', b3_config)


@pytest.fixture(scope='session')
def b4_config(colours, b3_run, tmp_path_factory):
    """40 steps of 20 examples, evaluated at steps 0, 30 and 40."""
    text = colours / 'pictures' / 'text.jsonl'
    return write_config(
        tmp_path_factory.mktemp('b4') / 'b4_tiny.py', **TINY, shards_dir=colours / 'shards', new_rows_dir=b3_run.out,
        image_codec='stub', audio_codec='stub', text_jsonl=text, replay_jsonl=text, lora_r=4, lora_alpha=8,
        lora_dropout=0.0, task_weights={'i2t': 1.5, 'a2t': 1.0, 't2i': 2.0, 't2a': 1.5},
        task_weights_start={'i2t': 1.0, 'a2t': 1.0, 't2i': 1.0, 't2a': 1.0}, max_seq_len=64, global_batch_size=20,
        micro_batch_size=20, learning_rate=1e-2, lora_learning_rate=1e-3, epoch_samples=800, eval_every=30, n_golden=4,
        n_predictions=16, n_text=12, guidance=(1.0, 2.0), gate_items=24, gate_prompt_nats=0.2, gate_shuffled_win=0.6,
        gate_read_points=35.0, gate_pixel_std=1.0, gate_spectral_std=0.1)


@pytest.fixture(scope='session')
def b4_run(b4_config, tmp_path_factory):
    return run_once(tmp_path_factory, 'b4_run', run_with_stubs, 'train_b4.py', b4_config)
