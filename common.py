"""
What every script shares and what has one right answer: ranks, seeds, whole files, checkpoints that survive a kill, and
the run: its lock, its log, its meter, its progress, its gradients.
"""
import errno
import hashlib
import json
import math
import os
import pickle
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from watch import WATCH

# -----------------------------------------------------------------------------
# ranks. One convention: `if rank == 0` guards files and prints, never a collective


def exact_float32():
    """CUDA multiplies float32 as float32 and not as TF32, which keeps ten bits of it: a picture has the same codes
    whichever script encodes it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False            # True by itself: the codecs' convolutions


def init_ranks(device='auto', deterministic=False):
    """(rank, world_size, device) for `python script.py` and `torchrun script.py`, on CPU or CUDA.

    Host numbers and objects always go over gloo, what is on a GPU over NCCL: a rank that waits for another one's disk
    keeps no GPU busy, and hears at once when that one has ended. deterministic: on CUDA, kernels that give the same
    bits each time; a CPU's do anyway.
    """
    exact_float32()
    world_size = int(os.environ.get('WORLD_SIZE', 1))  # torchrun sets these
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    kind = device.split(':')[0]
    if kind not in ('cpu', 'cuda'):
        raise SystemExit(f'device = {device!r}: wanted auto, cpu or cuda')
    if kind == 'cuda':
        if not torch.cuda.is_available():
            raise SystemExit(f'device = {device!r}, but this machine shows no CUDA device: '
                             'set device = "cpu" or "auto"')
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f'rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; '
                             'lower --nproc_per_node')
        if world_size > 1 or device == 'cuda':         # cuda:3 stays what it is on a single rank
            device = f'cuda:{local_rank}'
        if deterministic:
            os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'   # read when CUDA starts, which is below
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # torch's own timeout is out of the way: NCCL's ten minutes would end a run whose first rank reads every picture
        backend = 'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(minutes=WATCH.minutes))
        WATCH.start()
    return int(os.environ.get('RANK', 0)), world_size, torch.device(device)


def rank_of():
    """(rank, world_size) of this process, for functions that are called on every rank."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shutdown_ranks():
    """The last line of a script: NCCL warns of a process group that is left behind."""
    if dist.is_initialized():
        WATCH.end()
        dist.destroy_process_group()


def frozen_dtype(name, device):
    """The torch dtype of frozen weights by its name. auto: bfloat16 where the device multiplies it, else float32."""
    if name == 'auto':
        name = 'bfloat16' if device.type == 'cuda' or cpu_multiplies_bfloat16() else 'float32'
    if name not in ('bfloat16', 'float32'):
        raise SystemExit(f'dtype = {name!r}: wanted auto, bfloat16 or float32')
    return getattr(torch, name)


def cpu_multiplies_bfloat16():
    """Such a processor takes a quarter of the time; others convert every number and take longer than in float32."""
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()   # torch before 2.11 does not say
    return bool(capabilities.get('avx512_bf16') or capabilities.get('amx_bf16'))


def all_sum(value):
    """The sum of a number over the ranks, in float64, the same on every rank."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64)   # float32 would round counts above 2^24
    with WATCH.collective():
        dist.all_reduce(total)
        return total.item()


def all_gather(obj):
    """[every rank's obj], in rank order."""
    if not dist.is_initialized():
        return [obj]
    objs = [None] * dist.get_world_size()              # torch fills it
    with WATCH.collective():
        dist.all_gather_object(objs, obj)
    return objs


def on_rank_0(function, *args, **named):
    """function(*args, **named), which rank 0 alone calls; the same on every rank."""
    result = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        result = function(*args, **named)
    barrier()
    return from_rank_0(result)


def from_rank_0(obj):
    """Rank 0's obj, on every rank: sent to each, where all_gather would hold as many of its size as there are ranks."""
    objs = [obj]
    if dist.is_initialized():
        with WATCH.collective():
            dist.broadcast_object_list(objs, src=0)
    return objs[0]


def gather_in_order(results):
    """Every rank's results of its items[rank::world_size] -> the results of all items, in the order of the items."""
    parts = all_gather(list(results))
    n_items = sum(len(part) for part in parts)
    return [parts[n % len(parts)][n // len(parts)] for n in range(n_items)]   # item n was given to rank n % ranks


def in_parts(items, size):
    """[items[:size], items[size:2 * size], ...]"""
    return [items[i:i + size] for i in range(0, len(items), size)]


BETWEEN_BATCHES = []                                   # what stoppable_parts calls; training.StopSignal fills it


def rank_parts(items, size, rank, world_size):
    """This rank's items of an evaluation, items[rank::world_size], in parts that a stop can come between."""
    return stoppable_parts(items[rank::world_size], size, most=math.ceil(len(items) / world_size))


def stoppable_parts(mine, size, most):
    """Items in parts. Between two of them a run that was asked to stop ends, on every rank at once.

    most: as many items as any rank has. Every rank asks equally often, or a sum over the ranks in ask() would hang.
    """
    for first in range(0, most, size):
        for ask in BETWEEN_BATCHES:
            ask()
        if first < len(mine):
            yield mine[first:first + size]


def barrier():
    """Nobody goes on before everybody is here. It stands behind what a rank does alone, or with a disk: the others wait
    for that in the store and in no collective, and so as long as it takes."""
    if dist.is_initialized():
        WATCH.in_store()


def reduce_gradients(parameters):
    """Add up every gradient over the ranks, in one message; a parameter that had none on this rank counts as zero."""
    if not dist.is_initialized():
        return
    # the gradients of weights in shards are sums over the ranks already: see sharding.py
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    # the first numbers of the message say which parameters had a gradient on any rank
    had_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    pieces = [had_gradient]
    for p in parameters:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        pieces.append(gradient.flatten())
    flat = torch.cat(pieces)                           # one message: many small ones wait for each other
    with WATCH.collective(flat.device.type):
        dist.all_reduce(flat)
        had_gradient, *pieces = flat.split([len(piece) for piece in pieces])
        had_gradient = had_gradient.tolist()
    for p, piece, had_any in zip(parameters, pieces, had_gradient):
        p.grad = piece.view_as(p) if had_any else None   # none on any rank: none, as on a single rank


def seed_everything(*key):
    """Seed torch, numpy and random from a key such as (seed, step, rank). Called anew each step, it makes dropout a
    function of the step, and a checkpoint needs no generator state."""
    n = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], 'big')   # numpy takes 32 bits
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


# -----------------------------------------------------------------------------
# files that are whole or absent


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):                # a MB at a time: files may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(named, dtype=None):
    """One sha256 over (name, tensor) pairs: any change of a name, shape, dtype or bit changes it. dtype: as if they
    were of this one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):   # a model's own order may change with a version
        if dtype is not None:
            tensor = tensor.to(dtype)
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        # numpy has no bfloat16: the bytes are taken as they are; and a tensor that has been .numpy() keeps its size for
        # ever, while weights in shards come and go
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(np.from_dlpack(content).tobytes())
    return digest.hexdigest()


def first_line(e):
    """What an exception says, cut to a line; its type where it says nothing."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def hint_of(e):
    """What to do about a failure to write."""
    number = getattr(e, 'errno', None)
    if number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        return 'something else is in its place'
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 'name another folder'
    return 'is the disk full?'


@contextmanager
def one_line_io_errors(path):
    """A full disk, or a folder that is not ours, ends the run with one line that names what was to be written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise SystemExit(f'{path}: cannot write here, {hint_of(e)} ({first_line(e)})')


def flush_folder(folder):
    handle = os.open(folder, os.O_RDONLY)              # the names in a folder are flushed by the folder's own handle
    os.fsync(handle)
    os.close(handle)


def flush_files(folder):
    """Every file below the folder, and the folder itself, to the disk."""
    for path in folder.rglob('*'):
        if path.is_file():
            with open(path, 'rb') as f:
                os.fsync(f.fileno())
    flush_folder(folder)


def write_atomic(path, content):
    """Write text or bytes beside their place, flush to disk, rename: readers see the old or the new, never half."""
    path = Path(path)
    beside = path.with_name(f'.{path.name}.tmp')       # hidden: X.tmp may be a user's own
    with one_line_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, 'wb') as f:
                f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)                   # atomic within a file system
        finally:
            beside.unlink(missing_ok=True)


def finite(value):
    """A value that is to be JSON, with None in the place of NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical(value):
    """The one JSON text of a value that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(',', ':'), ensure_ascii=True, allow_nan=False)


def write_sealed(path, content):
    """A dict as JSON, with a sha256 over the rest of it."""
    sha256 = hashlib.sha256(canonical(content).encode()).hexdigest()
    write_atomic(path, json.dumps({**content, 'sha256': sha256}, indent=1) + '\n')


def read_sealed(path, writer):
    """What write_sealed wrote; exits with one line when the file is absent or any of it has changed.

    writer: the script that writes it, for that line.
    """
    try:
        content = json.loads(Path(path).read_text())
        sealed_with = content.pop('sha256')
    except OSError as e:
        raise SystemExit(f'{path}: cannot read it ({e.strerror}); {writer} writes it when what it names is whole')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f'{path}: not what {writer} writes ({e}); remove it and run {writer} again')
    if sealed_with != hashlib.sha256(canonical(content).encode()).hexdigest():
        raise SystemExit(f'{path}: its sha256 is not that of its content; remove it and run {writer} again')
    return content


def require_vacant(folder):
    """Exit with one line when `folder` is anything but absent or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f'{folder} is there already and not empty: name another folder')


@contextmanager
def whole_folder(folder):
    """A hidden folder to write in, which becomes `folder` when the block has ended well, every file flushed to disk and
    readable for others; else nothing is left. Exits with one line when `folder` is not vacant."""
    require_vacant(folder)
    folder = Path(folder)
    with one_line_io_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as hidden:
            beside = Path(hidden) / folder.name
            beside.mkdir()
            yield beside
            for path in beside.rglob('*'):
                if path.is_file():
                    path.chmod(0o644)                  # safetensors writes 0600
            flush_files(beside)
            os.replace(beside, folder)
            flush_folder(folder.parent)


# -----------------------------------------------------------------------------
# checkpoints


def beside_of(folder):
    """Where a checkpoint is written before it takes its place: hidden, X.tmp may be a user's own."""
    return folder.with_name(f'.{folder.name}.tmp')


def save_checkpoint(folder, tensors, meta, write_more=None):
    """Write `folder`/{meta.json, <name>.pt ...} with a sha256 manifest; the one that was there becomes `folder`.prev.

    tensors: {name: what torch.save takes, loadable with weights_only=True}; meta: JSON-able. Written beside, flushed,
    renamed: a kill at any moment leaves a whole checkpoint. write_more(folder): writes files that belong to it.
    """
    folder = Path(folder)
    beside = beside_of(folder)
    try:
        if corruption_of(beside) is None:              # what a kill has kept from its place: it may be the newest
            put_in_place(beside, folder)
        shutil.rmtree(beside, ignore_errors=True)      # what a kill left half
        beside.mkdir(parents=True)
        for name, value in tensors.items():
            torch.save(value, beside / f'{name}.pt')
        if write_more is not None:
            write_more(beside)
        (beside / 'meta.json').write_text(json.dumps(meta, indent=1))
        # torch.load takes a file with a flipped bit for whole: the manifest is what tells
        files = [path for path in sorted(beside.rglob('*')) if path.is_file()]
        manifest = {str(path.relative_to(beside)): sha256_file(path) for path in files}
        (beside / 'manifest.json').write_text(json.dumps(manifest, indent=1))
        flush_files(beside)
        put_in_place(beside, folder)
    except (OSError, RuntimeError) as e:               # torch's writer has its own words for a full disk
        if corruption_of(beside) is not None:
            shutil.rmtree(beside, ignore_errors=True)
        before = 'the one before it is whole' if has_checkpoint(folder) else 'there is none before it'
        raise SystemExit(f'{folder}: cannot write this checkpoint, {hint_of(e)} ({first_line(e)}); {before}')


def put_in_place(beside, folder):
    """At any moment of this one of the three folders is a whole checkpoint: load_checkpoint looks at each."""
    previous = folder.with_name(folder.name + '.prev')
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(beside, folder)
    flush_folder(folder.parent)


def corruption_of(folder):
    """What is wrong with the checkpoint in this folder, or None."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        if not isinstance(manifest, dict) or 'meta.json' not in manifest:
            return 'its manifest does not name the files of a checkpoint'
        for name, sha256 in manifest.items():
            if sha256_file(folder / name) != sha256:
                return f'sha256 of {name} differs from the manifest'
    except (OSError, ValueError, RecursionError) as e:
        return first_line(e)
    return None


def read_checkpoint(folder, map_location):
    """(tensors, meta) of a checkpoint of which corruption_of finds nothing; a ValueError says what is no checkpoint."""
    tensors = {}
    for name in json.loads((folder / 'manifest.json').read_text()):
        if name.endswith('.pt'):
            try:
                # tensors only: the code in a pickle is not run
                tensors[name.removesuffix('.pt')] = torch.load(folder / name, map_location, weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
                raise ValueError(f'{name} is no file of tensors ({first_line(e)})')
    meta = json.loads((folder / 'meta.json').read_text())
    if not isinstance(meta, dict):
        raise ValueError('meta.json says nothing about a checkpoint')
    return tensors, meta


def load_checkpoint(folder, map_location='cpu'):
    """(tensors, meta, folder used) of a checkpoint, or of the previous one if this one is damaged. On every rank: rank
    0 looks for damage, so that it is read for that once, and all take the same one.

    Raises SystemExit when neither is whole.
    """
    folder = Path(folder)
    candidates = [folder, folder.with_name(folder.name + '.prev')]
    if on_rank_0(corruption_of, beside_of(folder)) is None:   # killed before it was in its place: the newest
        candidates.insert(0, beside_of(folder))
    if not any(candidate.exists() for candidate in candidates):
        raise SystemExit(f'{folder}: no checkpoint here; is this the out dir of a run, and has it saved one?')
    problems = []
    for candidate in candidates:
        problem = on_rank_0(corruption_of, candidate)
        try:
            if problem is None:
                tensors, meta = read_checkpoint(candidate, map_location)
                if problems and rank_of()[0] == 0:     # not in silence: the steps since then are lost
                    print(f'{problems[0]}: using {candidate}', file=sys.stderr)
                return tensors, meta, candidate
        except ValueError as e:
            problem = e
        problems.append(f'{candidate}: {problem}')
    raise SystemExit('no whole checkpoint: ' + '; '.join(problems))


def has_checkpoint(folder):
    folder = Path(folder)
    return folder.exists() or Path(f'{folder}.prev').exists() or corruption_of(beside_of(folder)) is None


# -----------------------------------------------------------------------------
# one writer per folder, and what ran on what


def new_figure(width, height):
    """A matplotlib Figure for a file. No pyplot: it chooses a backend; and a wrong one in MPLBACKEND, which a notebook
    leaves behind, breaks the import of matplotlib."""
    os.environ.pop('MPLBACKEND', None)
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')


def lock_run(out_dir):
    """Claim out_dir for this process, as long as it keeps what this returns; exits with one line if another has it."""
    path = Path(out_dir)
    if not str(out_dir):                               # Path('') is where the command was typed
        raise SystemExit("out_dir = '': wanted a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / '.lock', timeout=0)     # the system gives it up when the process dies, kill -9 included
        lock.acquire()
    except Timeout:
        raise SystemExit(f'{out_dir}: another run is writing here; wait for it or set another out_dir')
    except OSError as e:
        raise SystemExit(f'{out_dir}: cannot write here ({e.strerror}); set another out_dir')
    return lock


@contextmanager
def one_process_at_a_time(path, what):
    """Hold the lock in this file while in the block; a line says so when another process has it. what: it is doing."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        print(f'another process {what}: waiting for it ({path} is locked)', flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


LOCK_SECONDS = 5.0                                     # without a line


def processor_name():
    """The processor's own name, since figures to the last digit belong to a kind of processor."""
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    except OSError:
        pass                                           # no Linux
    return platform.processor() or platform.machine()


def provenance():
    """Commit, dirty flag, versions and hardware, for the log's first record."""
    def git(*args):
        try:
            done = subprocess.run(['git', *args], cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
        except OSError:                                # no git here
            return ''
        return done.stdout.strip()
    import transformers                                # here: it takes a second, and most of this file is needed sooner
    device = f'{processor_name()}, {os.cpu_count()} cores'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        'commit': git('rev-parse', '--short', 'HEAD'),
        'dirty': bool(git('status', '--porcelain')),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'device': device,
        'date': time.strftime('%Y-%m-%d'),
    }


def peak_memory_mb(device):
    """Peak memory of this process in MB: of the GPU where there is one, else resident memory."""
    if device.type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


# -----------------------------------------------------------------------------
# progress


class Progress:
    """How far a long loop is. On a terminal a bar; elsewhere a plain line every half minute:

        llm: step 400 of 2,000, loss 1.23, about 4 min left

    position: the line of the bar, when several processes show one each; active: False on all ranks but the first.
    """
    SECONDS = 30

    def __init__(self, total, title, initial=0, active=True, position=0, clock=time.monotonic):
        self.total = total
        self.title = title
        self.done = self.initial = initial
        self.active = active
        self.clock = clock
        self.began = self.spoke = clock()              # spoke: when a line was last written
        self.bar = None
        if active and sys.stderr.isatty():
            # leave=None: only the bar on the first line stays when it is done, the others would shift each other
            self.bar = tqdm(total=total, desc=title, initial=initial, position=position, dynamic_ncols=True, leave=None)

    def update(self, n=1, **shown):
        """n more are done. shown: numbers to show, such as loss=1.23."""
        n = min(n, self.total - self.done)             # of several ranks the last step may be one of few
        self.done += n
        numbers = {name: f'{value:.4g}' for name, value in shown.items()}
        if self.bar is not None:
            if numbers:
                self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(n)
        elif self.active and self.clock() - self.spoke >= self.SECONDS:   # a line that was written counts too
            parts = [f'{self.title}: step {self.done:,} of {self.total:,}']
            parts += [f'{name} {number}' for name, number in numbers.items()]
            self.write(', '.join([*parts, self.time_left()]))

    def time_left(self):
        elapsed = self.clock() - self.began
        seconds = elapsed / max(self.done - self.initial, 1) * (self.total - self.done)
        return f'about {math.ceil(seconds / 60)} min left' if seconds > 60 else f'about {math.ceil(seconds)} s left'

    def write(self, line):
        """A line of text above the bar."""
        if not self.active:
            return
        self.spoke = self.clock()
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress(items, title, active=True, position=0):
    """The items one after the other, with a Progress."""
    shown = Progress(len(items), title, active=active, position=position)
    for item in items:
        yield item
        shown.update()
    shown.close()
