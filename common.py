"""What every training script shares: ranks, checkpoints that survive a kill, the run lock, the log, time budgets."""
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError

# -----------------------------------------------------------------------------
# ranks: three functions and one convention. `if rank == 0` guards files and prints, never a collective


def init_ranks(device='auto'):
    """(rank, world_size, device) for `python script.py` and `torchrun script.py`, on CPU (gloo) or CUDA (nccl)."""
    world_size, local_rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('LOCAL_RANK', 0))
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
        device = f'cuda:{local_rank}' if world_size > 1 or device == 'cuda' else device
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    return int(os.environ.get('RANK', 0)), world_size, torch.device(device)


def frozen_dtype(name, device):
    """The torch dtype of frozen weights by its name; auto is bfloat16 on CUDA and float32 on CPU."""
    name = ('bfloat16' if device.type == 'cuda' else 'float32') if name == 'auto' else name
    if name not in ('bfloat16', 'float32'):
        raise SystemExit(f'dtype = {name!r}: wanted auto, bfloat16 or float32')
    return getattr(torch, name)


def all_sum(value):
    """The sum of a number over the ranks, in float64, the same on every rank."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64,
                         device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
    dist.all_reduce(total)
    return total.item()


def all_gather(obj):
    """[every rank's obj], in rank order."""
    if not dist.is_initialized():
        return [obj]
    objs = [None] * dist.get_world_size()
    dist.all_gather_object(objs, obj)
    return objs


def reduce_gradients(parameters):
    """Add up every gradient over the ranks, in one message; a parameter that had none on this rank counts as zero."""
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    had = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat([had] + [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    had, *parts = flat.split([len(parameters)] + [p.numel() for p in parameters])
    for p, part, any_had in zip(parameters, parts, had.tolist()):
        p.grad = part.view_as(p) if any_had else None      # none on any rank: none, as on a single rank


def seed_everything(*key):
    """Seed torch, numpy and random from a key such as (seed, step, rank). Called anew each step, it makes dropout a
    function of the step, and a checkpoint needs no generator state."""
    n = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], 'big')
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


# -----------------------------------------------------------------------------
# files that are whole or absent


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(named, dtype=None):
    """One sha256 over (name, tensor) pairs: any change of a name, shape, dtype or bit changes it. dtype: as if they
    were of this one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        tensor = tensor if dtype is None else tensor.to(dtype)
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def writing(path):
    """A full disk, or a folder that is not ours, ends the run with one line that names what was to be written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        hint = 'name another folder' if isinstance(e, PermissionError) else 'is the disk full?'
        raise SystemExit(f'{path}: cannot write here, {hint} ({str(e).splitlines()[0]})')


def write_atomic(path, content):
    """Write text or bytes beside their place, flush to disk, rename: readers see the old or the new, never half."""
    path = Path(path)
    beside = path.with_name(path.name + '.tmp')
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, 'wb') as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)


def require_vacant(folder):
    """Exit with one line when `folder` is anything but absent or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f'{folder} is there already and not empty: name another folder')


@contextmanager
def whole_folder(folder):
    """A folder beside `folder` to write in, which becomes `folder` when the block has ended well, every file flushed to
    disk and readable for others; else nothing is left. Exits with one line when `folder` is not vacant."""
    require_vacant(folder)
    folder = Path(folder)
    beside = folder.with_name(folder.name + '.tmp')
    try:
        with writing(folder):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for path in (p for p in beside.rglob('*') if p.is_file()):
                path.chmod(0o644)                      # safetensors writes 0600
                with open(path, 'rb') as f:
                    os.fsync(f.fileno())
            sync_folder(beside)
            os.replace(beside, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_checkpoint(folder, tensors, meta):
    """Write `folder`/{meta.json, <name>.pt ...} with a sha256 manifest; the one that was there becomes `folder`.prev.

    tensors: {name: what torch.save takes, loadable with weights_only=True}; meta: JSON-able. Written beside, fsynced,
    renamed.
    """
    folder = Path(folder)
    beside, previous = folder.with_name(folder.name + '.tmp'), folder.with_name(folder.name + '.prev')
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, value in tensors.items():
            torch.save(value, beside / f'{name}.pt')
        (beside / 'meta.json').write_text(json.dumps(meta, indent=1))
        manifest = {p.name: sha256_file(p) for p in sorted(beside.iterdir())}
        (beside / 'manifest.json').write_text(json.dumps(manifest, indent=1))
        for path in beside.iterdir():
            with open(path, 'rb') as f:
                os.fsync(f.fileno())
        sync_folder(beside)
    except (OSError, RuntimeError) as e:               # torch's writer has its own words for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        before = 'the one before it is whole' if has_checkpoint(folder) else 'there is none before it'
        raise SystemExit(f'{folder}: cannot write this checkpoint, is the disk full? ({str(e).splitlines()[0]}); '
                         f'{before}')
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(beside, folder)
    sync_folder(folder.parent)


def damage(folder):
    """What is wrong with the checkpoint in this folder, or None."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        wrong = [name for name, sha in manifest.items() if sha256_file(folder / name) != sha]
    except (OSError, ValueError) as e:
        return str(e)
    return f'sha256 of {wrong[0]} differs from the manifest' if wrong else None


def load_checkpoint(folder, map_location='cpu'):
    """(tensors, meta, folder used) of a checkpoint, or of the previous one if this one is damaged.

    Raises SystemExit when neither is whole.
    """
    folder, reasons = Path(folder), []
    candidates = [folder.with_name(folder.name + end) for end in ('', '.prev', '.tmp')]
    if not any(candidate.exists() for candidate in candidates):
        raise SystemExit(f'{folder}: no checkpoint here; is this the out dir of a run, and has it saved one?')
    for candidate in candidates if candidates[2].exists() else candidates[:2]:   # .tmp: whole, if killed while moving
        wrong = damage(candidate)
        if wrong is None:
            if reasons:
                print(f'{reasons[0]}: using {candidate}', file=sys.stderr)
            tensors = {p.stem: torch.load(p, map_location=map_location, weights_only=True)
                       for p in candidate.glob('*.pt')}
            return tensors, json.loads((candidate / 'meta.json').read_text()), candidate
        reasons.append(f'{candidate}: {wrong}')
    raise SystemExit('no whole checkpoint: ' + '; '.join(reasons))


FREE_ON_RESUME = {'resume', 'batch_size', 'out_dir', 'device', 'feature_cache', 'workers', 'log_every',
                  'max_bad_samples', 'allow_failed_gates', 'epoch_samples', 'epoch_minutes', 'image_codec',
                  'audio_codec', 'tensorboard'}


def check_resumable(meta, settings, frozen_sha256, folder):
    """A run goes on only as what it was: same settings, but for those of the machine, and same frozen weights."""
    for key, had in meta['settings'].items():
        if key not in FREE_ON_RESUME and json.dumps(settings.get(key)) != json.dumps(had):
            raise SystemExit(f'{folder} has {key} = {had!r}, this run has {settings.get(key)!r}: cannot resume')
    if meta['frozen_sha256'] != frozen_sha256:
        raise SystemExit(f'{folder} was trained on other frozen weights (sha256 {meta["frozen_sha256"][:12]}, '
                         f'this run has {frozen_sha256[:12]}): cannot resume')


def has_checkpoint(folder):
    return Path(folder).exists() or Path(f'{folder}.prev').exists()


# -----------------------------------------------------------------------------
# the run: one writer per folder, a way to stop it, a log of it


def lock_run(out_dir):
    """Claim out_dir for this process until it ends; exits with one line if another run has it."""
    path = Path(out_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / '.lock', timeout=0)
        lock.acquire()
    except Timeout:
        raise SystemExit(f'{out_dir}: another run is writing here; wait for it or set another out_dir')
    except OSError as e:
        raise SystemExit(f'{out_dir}: cannot write here ({e.strerror}); set another out_dir')
    return lock


class StopSignal:
    """True once SIGTERM or Ctrl-C has come; the loop then saves and leaves. A second Ctrl-C ends at once."""
    def __init__(self):
        self.name = ''
        for sig in signal.SIGTERM, signal.SIGINT:
            signal.signal(sig, self.note)

    def note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self):                                # on every rank or on none: one rank's signal stops all
        return all_sum(bool(self.name)) > 0


def provenance():
    """Commit, dirty flag, versions and hardware, for the log's first record."""
    def git(*args):
        try:
            return subprocess.run(['git', *args], cwd=Path(__file__).resolve().parent, capture_output=True,
                                  text=True).stdout.strip()
        except OSError:
            return ''
    import transformers
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {'commit': git('rev-parse', '--short', 'HEAD'), 'dirty': bool(git('status', '--porcelain')),
            'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__,
            'device': gpu or f'{platform.machine()} CPU, {os.cpu_count()} cores', 'date': time.strftime('%Y-%m-%d')}


def tensorboard_writer(wanted):
    """The class that writes for TensorBoard, or None; exits with one line when it is wanted and not installed."""
    if not wanted:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit('tensorboard = True, but the package tensorboard is not installed: pip install tensorboard, '
                         'or set tensorboard = False')
    return SummaryWriter


class Log:
    """out_dir/log.jsonl, one JSON object a line. On resume the records after the checkpoint's step are dropped, so that
    the log of a resumed run has the lines of an uninterrupted one.

    writer: of tensorboard_writer; the numbers of step and eval records then go to out_dir/tensorboard too.
    """
    def __init__(self, path, resume_step=None, active=True, writer=None):
        self.path, self.active, self.board = Path(path), active, None
        if not active:
            return
        if writer is not None:
            folder, purge = self.path.parent / 'tensorboard', None if resume_step is None else resume_step + 1
            if resume_step is None:                    # of a run that was killed before its first checkpoint
                shutil.rmtree(folder, ignore_errors=True)
            self.board = writer(str(folder), purge_step=purge)   # points from there on are hidden: they come again
        kept = []
        if resume_step is not None and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if complete(line, resume_step)]
        write_atomic(self.path, ''.join(line + '\n' for line in kept))

    def write(self, kind, **record):
        if self.active:
            with writing(self.path), open(self.path, 'a') as f:
                f.write(json.dumps({'kind': kind, **record}) + '\n')
        if self.board is not None and kind in ('step', 'eval'):
            for name, value in record.items():
                if name != 'step' and type(value) in (int, float):
                    self.board.add_scalar(f'{kind}/{name}', value, record['step'])
            self.board.flush()


def complete(line, step):
    """Is this log line whole, and not from after the step?"""
    try:
        return json.loads(line).get('step', 0) <= step
    except ValueError:                                 # a kill can leave half a line at the end
        return False


def peak_memory_mb(device):
    """Peak memory of this process in MB: of the GPU where there is one, else resident memory."""
    if device.type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def epoch_samples_for(epoch_minutes, step_seconds, rows_per_step):
    """How many samples one epoch of epoch_minutes holds, from the median of measured step times, in whole steps."""
    steps = max(1, int(epoch_minutes * 60 / float(np.median(step_seconds))))
    return steps * rows_per_step
