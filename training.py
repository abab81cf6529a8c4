"""
What the training scripts share: a run's folder and status, going on with it, stopping it, its log and meter, and what
surrounds an update. What a reader comes to edit (loss, schedule, mixture, the loop itself) stands in the scripts.
"""
import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from common import (
    BETWEEN_BATCHES, all_gather, all_sum, barrier, finite, first_line, has_checkpoint, lock_run, on_rank_0,
    one_line_io_errors, peak_memory_mb, rank_of, sha256_tensors, write_atomic)

# -----------------------------------------------------------------------------
# a run: its folder, its status, going on with it, stopping it

HELD_LOCKS = []                                        # a lock that nobody refers to is given up


def open_run(out_dir, resume, rank):
    """Lock a training run's folder; (it as a Path, whether there is a checkpoint to go on from). On every rank.

    Exits with one line when the folder holds a checkpoint and resume is False.
    """
    out = Path(out_dir)
    if rank == 0:
        HELD_LOCKS.append(lock_run(out_dir))
    barrier()
    is_there = has_checkpoint(out / 'ckpt')
    if is_there and not resume:
        raise SystemExit(f'{out_dir} holds a checkpoint: set resume = True to go on with it, or another out_dir')
    if rank == 0 and resume and not is_there:
        print(f'{out_dir} holds no checkpoint yet: this run begins at its first step')
    if rank == 0 and not is_there and not (out / 'split.json').exists():
        (out / 'bad_samples.jsonl').unlink(missing_ok=True)    # of a run that came to nothing: they are met anew
    return out, is_there


def write_status(out, state, step, n_steps):
    """out/status.json. state: running, stopped, diverged or finished; torchrun's own exit status does not tell them
    apart."""
    write_atomic(out / 'status.json', json.dumps({'state': state, 'step': step, 'n_steps': n_steps}))


class StopSignal:
    """True once SIGTERM or Ctrl-C has come; the loop then saves and leaves. A second Ctrl-C ends at once.

    Before it is first asked there is nothing to save: a signal ends the run at once; is_resumed: there is a checkpoint,
    which that leaves as it is. Between two batches of an evaluation it is asked too: it then calls the script's `save`,
    and leaves.

    It also tells, since the ranks hear of each other here, when the last checkpoint is save_minutes old: save_is_due.
    """
    LOOK_SECONDS = 2.0                                 # between two looks at the other ranks: a stop takes ten at most

    def __init__(self, save_minutes=math.inf, is_resumed=False, clock=time.monotonic):
        self.save_seconds = 60 * save_minutes
        self.is_resumed = is_resumed
        self.save_is_due = False                       # of the step that before_step was asked about
        self.clock = clock
        self.looked_at = self.saved_at = clock()
        self.n_between = self.steps_to_go = 1          # steps between two looks, and until the next one
        self.name = ''
        self.asked = False
        self.save = None                               # the script's, from where there is something to save
        self.step = 0                                  # of the last save: at step 0 it writes no checkpoint
        for sig in signal.SIGTERM, signal.SIGINT:      # a scheduler's, and Ctrl-C
            signal.signal(sig, self.note)
        BETWEEN_BATCHES[:] = [self.between_batches]

    def note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name        # only noted: the loop stops where it can save
        if not self.asked:
            self.leave()

    def __bool__(self):                                # on every rank or on none: one rank's signal stops all
        self.asked = True
        return all_sum(bool(self.name)) > 0

    def before_step(self):
        """The same, asked before every step: the ranks hear of each other every two seconds or so, since each time is a
        wait for all. Steps that become slower are noticed: what is measured halves or doubles the number at most."""
        self.asked = True
        now = self.clock()
        self.save_is_due = now - self.saved_at >= self.save_seconds
        if rank_of()[1] == 1:
            return bool(self.name)
        self.steps_to_go -= 1
        if self.steps_to_go > 0:
            self.save_is_due = False
            return False
        looks = all_gather((bool(self.name), (now - self.looked_at) / self.n_between, self.save_is_due))
        self.save_is_due = looks[0][2]                 # clocks differ: rank 0's holds, it writes
        slowest = max(1e-3, *(seconds for _, seconds, _ in looks))     # the same number on every rank
        self.n_between = int(min(max(self.LOOK_SECONDS / slowest, 1), 2 * self.n_between))
        self.looked_at = now
        self.steps_to_go = self.n_between
        return any(signalled for signalled, _, _ in looks)

    def saved(self, step):
        """At the end of every save."""
        self.step = step
        self.saved_at = self.clock()

    def between_batches(self):
        if self.save is not None and self:
            self.save('stopped')
            self.leave()

    def leave(self):
        name = self.name or 'another rank'
        if self.step == 0:
            left = 'its checkpoint is as it was, go on with --resume=True' if self.is_resumed else 'nothing was saved'
            raise SystemExit(f'{name} stopped this run before its first step: {left}')
        raise SystemExit(f'{name} stopped this run: saved at step {self.step}, go on with --resume=True')


# what a resumed run may change: the machine it runs on, where its files are, and the bars of its gates
FREE_ON_RESUME = {'resume', 'micro_batch_size', 'out_dir', 'device', 'feature_cache', 'workers', 'log_every',
                  'max_bad_samples', 'allow_failed_gates', 'epoch_samples', 'epoch_minutes', 'image_codec',
                  'audio_codec', 'tensorboard', 'timeout', 'feature_cache_gb', 'eval_first', 'init_from',
                  'gradient_checkpointing', 'eval_time_share', 'n_golden_between', 'shard', 'save_minutes'}


def check_resumable(meta, settings, frozen_sha256, folder):
    """A run goes on only as what it was: same settings, but for those of the machine, and same frozen weights."""
    for key, had in meta['settings'].items():
        # as JSON, which the checkpoint went through: a tuple came back as a list
        is_free = key in FREE_ON_RESUME or key.startswith('gate_')
        if not is_free and json.dumps(settings.get(key)) != json.dumps(had):
            raise SystemExit(f'{folder} has {key} = {had!r}, this run has {settings.get(key)!r}: cannot resume')
    if meta['frozen_sha256'] != frozen_sha256:
        raise SystemExit(f'{folder} was trained on other frozen weights (sha256 {meta["frozen_sha256"][:12]}, '
                         f'this run has {frozen_sha256[:12]}), or in another dtype: cannot resume')


def check_same_data(meta, data, folder):
    """And on the same data, {name of a part of it: what tells it from another}: the first that differs is named."""
    for name, had in meta['data'].items():
        if data.get(name) != had:
            raise SystemExit(f'{folder} was trained on other data: {name} was {had}, is {data.get(name, "gone")} now: '
                             'restore it, or train anew')


def check_same_parts(meta, stage, model, settings, frozen_sha256, folder):
    """A run starts from another one's weights only where they are of the same stage, shapes and frozen weights."""
    had = {'stage': meta['stage'], 'tower_layer': meta['model']['tower_layer'], **meta['model']['shape']}
    here = {'stage': stage, 'tower_layer': model['tower_layer'], **model['shape']}
    for name in 'lora_r', 'lora_alpha', 'lora_targets':   # of A2
        if name in settings:
            had[name] = meta['settings'].get(name)
            here[name] = settings[name]
    for name, value in here.items():
        if had[name] != value:
            raise SystemExit(f'init_from: {folder} has {name} = {had[name]!r}, this run has {value!r}')
    if meta['frozen_sha256'] != frozen_sha256:
        raise SystemExit(f'init_from: {folder} was trained on other frozen weights (sha256 '
                         f'{meta["frozen_sha256"][:12]}, this run has {frozen_sha256[:12]}), or in another dtype')


# -----------------------------------------------------------------------------
# the log


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
    """out_dir/log.jsonl, one JSON object a line. On resume the records after the checkpoint's step are dropped, and
    unless `evaluated` the evaluation of that step, which comes again, so that the log of a resumed run has the lines of
    an uninterrupted one.

    writer: of tensorboard_writer; the numbers of step and eval records then go to out_dir/tensorboard too.
    """
    def __init__(self, path, resume_step=None, evaluated=True, active=True, writer=None):
        self.path = Path(path)
        self.active = active
        self.board = None
        self.on_board = set()                          # (kind, step) of dropped evaluations, which it has already
        if not active:
            return
        if writer is not None:
            folder = self.path.parent / 'tensorboard'
            purge_step = None
            if resume_step is None:                    # events left by a run that died before its first checkpoint
                shutil.rmtree(folder, ignore_errors=True)
            else:
                purge_step = resume_step + 1           # the board hides older points from there on: they come again
            self.board = writer(str(folder), purge_step=purge_step)
        kept = []
        if resume_step is not None and self.path.exists():
            for line, kind, step in lines_until(self.path, resume_step):
                if kind == 'eval' and step == resume_step and not evaluated:
                    self.on_board.add((kind, step))
                else:
                    kept.append(line)
        write_atomic(self.path, b''.join(kept))

    def write(self, kind, **record):
        if self.active:
            with one_line_io_errors(self.path), open(self.path, 'a') as f:
                f.write(json.dumps(finite({'kind': kind, **record}), allow_nan=False) + '\n')
        if self.board is not None and kind in ('step', 'eval') and (kind, record['step']) not in self.on_board:
            for name, value in record.items():
                if name != 'step' and type(value) in (int, float):
                    self.board.add_scalar(f'{kind}/{name}', value, record['step'])
            self.board.flush()


def lines_until(path, step):
    """[(line, its kind, its step)] of a log's records that are not from after the step; exits with one line when one is
    damaged. A kill can leave half a line at the end."""
    kept = []
    lines = path.read_bytes().splitlines(keepends=True)
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record['kind'] and record.get('step', 0) <= step:
                kept.append((line.strip() + b'\n', record['kind'], record.get('step', 0)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            if n < len(lines):
                raise SystemExit(f'{path}:{n}: not a line of a log ({first_line(e)}); remove this line to go on')
    return kept


class Meter:
    """Loss and rates since the log was last written. The clock stands still between pause() and go_on(): what an
    evaluation takes is not a step's time."""
    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.start_window()

    def start_window(self):
        self.nats = self.labels = self.tokens = self.samples = 0
        self.seconds = self.waited = 0.0
        self.since = self.clock()

    def pause(self):
        self.seconds += self.clock() - self.since      # and the counts stay: clock and counts belong to the same steps

    def go_on(self):
        self.since = self.clock()

    def next_of(self, batches_of_steps):
        """The next step's batches, and the time that they had to be waited for."""
        start = self.clock()
        batches = next(batches_of_steps)
        self.waited += self.clock() - start
        return batches

    def add(self, loss, n_labels, batches):
        """A step: its mean loss and its labels over all ranks, and this rank's batches."""
        self.nats += loss * n_labels                   # back to sums: a mean of means would be wrong
        self.labels += n_labels
        for batch in batches:
            self.tokens += len(batch.input_ids)
            self.samples += len(batch.items)

    def read(self, device):
        """The window as a dict, over all ranks; a new window begins."""
        self.pause()
        seconds = self.seconds
        record = {                                     # tokens and samples were counted on this rank, labels on all
            'window_loss': self.nats / max(self.labels, 1),    # every picture of it may have been a bad one
            'tokens_per_s': all_sum(self.tokens) / seconds,
            'labels_per_s': self.labels / seconds,
            'samples_per_s': all_sum(self.samples) / seconds,
            'data_wait': self.waited / seconds,
            'seconds': seconds,
            'peak_memory_mb': peak_memory_mb(device),
        }
        self.start_window()
        return record


# -----------------------------------------------------------------------------
# settings that cannot be meant


def require_positive(config, *names):
    for name in names:
        if not 0 < config[name] < math.inf:            # NaN, and 1e999, too
            raise SystemExit(f'{name} = {config[name]}: wanted more than 0')


def require_not_negative(config, *names):
    for name in names:
        if not 0 <= config[name] < math.inf:
            raise SystemExit(f'{name} = {config[name]}: wanted 0 or more')


def require_numbers(config, *names):
    """Of settings that hold several: {name: number} or (number, ...), none below 0."""
    for name in names:
        values = config[name].values() if isinstance(config[name], dict) else config[name]
        for value in values:
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise SystemExit(f'{name} = {config[name]}: {value!r} is no number of 0 or more')


def require_split(config):
    """n_eval is enough to judge by; bucket_edges are none, or the most labels of a short and of a medium example."""
    if config['n_eval'] < 8:                           # as gates.clears asks
        raise SystemExit(f'n_eval = {config["n_eval"]}: wanted 8 or more, on fewer nothing can be judged')
    edges = config['bucket_edges']
    are_numbers = all(type(edge) is int for edge in edges)
    if edges and not (are_numbers and len(edges) == 2 and 0 < edges[0] < edges[1]):
        raise SystemExit(f'bucket_edges = {edges}: wanted two rising whole numbers, or () for thirds of the data')


def require_share(config, *names):
    for name in names:
        if not 0 <= config[name] <= 1:
            raise SystemExit(f'{name} = {config[name]}: wanted a share, from 0 to 1')


# -----------------------------------------------------------------------------
# what learns, and what must not


def parameter_groups(trainable, peaks, weight_decay):
    """AdamW's groups. peaks: {prefix of names: highest learning rate}; matrices decay, vectors do not."""
    groups = []
    for prefix, peak in peaks.items():
        parameters = [p for name, p in trainable.items() if name.startswith(prefix)]
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        if matrices:
            groups.append({'params': matrices, 'weight_decay': weight_decay, 'peak': peak})
        if vectors:
            groups.append({'params': vectors, 'weight_decay': 0.0, 'peak': peak})   # norms, biases
    return groups


def frozen_sha256(model, trainable):
    """Of every parameter that must not change, by the name that it has without LoRA."""
    frozen = []
    for name, p in model.named_parameters():
        if name not in trainable:
            frozen.append((name.replace('base_layer.', ''), p))        # what PEFT puts into the name
    return sha256_tensors(frozen)


# -----------------------------------------------------------------------------
# around a training step


N_WARMUP = 2                                           # first steps, which are slower
N_MEASURED = 5


def measure_epoch(steps, forward_backward, optimizer, epoch_minutes, global_batch_size, evaluate, eval_every,
                  eval_time_share):
    """(how many samples an epoch of epoch_minutes holds, in whole steps; after how many steps an evaluation comes), by
    the time of real steps, their data waited for, and of an evaluation, one of which stands at the start; the slowest
    rank's.

    steps: an iterator over the batches of N_WARMUP + N_MEASURED steps. evaluate: what the loop does at the first step,
    evaluate(at_end=False). eval_every: 0 for as often as evaluations take eval_time_share of the time.
    """
    seconds = []
    start = time.perf_counter()
    for batches in steps:
        forward_backward(batches)
        optimizer.zero_grad()
        if torch.cuda.is_available():                  # its work is only queued so far
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    evaluate(at_end=False)
    evaluation = max(all_gather(time.perf_counter() - start))
    step = max(all_gather(float(np.median(seconds[N_WARMUP:]))))      # every rank must come to the same number
    eval_every = eval_every or max(1, math.ceil(evaluation * (1 - eval_time_share) / (eval_time_share * step)))
    n_steps = (epoch_minutes * 60 - evaluation) / (step + evaluation / eval_every)
    return max(1, int(n_steps)) * global_batch_size, eval_every        # one step at least


def grad_norms(trainable, groups):
    """The gradient norm of each group of parameters. groups: {name for the log: prefix of names}."""
    norms = {}
    for group, prefix in groups.items():
        whole, shards = whole_and_sharded([p for name, p in trainable.items() if name.startswith(prefix)])
        square = square_of([p.grad for p in whole if p.grad is not None])
        if shards:                                     # each rank has its own part
            square += all_sum(square_of([p.grad.to_local() for p in shards if p.grad is not None]))
        norms[group] = math.sqrt(square)
    return norms


def whole_and_sharded(parameters):
    """(those that are whole on every rank, those that are in shards)."""
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    return whole, [p for p in parameters if isinstance(p, DTensor)]


def square_of(gradients):
    """The square of the norm of these gradients together."""
    # a row's norm in float32, which is exact enough; the sum over millions of rows in float64
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.cat(rows).double().square().sum().item() if rows else 0.0


def clip_gradients(trainable, grad_norm, grad_clip):
    """Scale all gradients so that their norm, which is grad_norm, is at most grad_clip."""
    for parameters in whole_and_sharded(trainable.values()):      # torch multiplies lists of one kind
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, torch.tensor(grad_norm, dtype=torch.float64))


def stop_if_eval_not_finite(step, means, out):
    """Before the checkpoint is saved: a model whose held-out loss is no number must not take a good one's place."""
    for name, mean in means.items():
        if not math.isfinite(mean):
            on_rank_0(write_status, out, 'diverged', step, n_steps=None)
            raise SystemExit(f'step {step}: {name} on the held-out items is {mean}; stopped without saving, what was '
                             'saved before is good')


def stop_if_not_finite(step, loss, grad_norm, batches, out):
    """Before the update: NaN or infinity ends the run on every rank, and the line names the samples of the step."""
    if math.isfinite(loss + grad_norm):
        return
    on_rank_0(write_status, out, 'diverged', step, n_steps=None)
    ids = []                                           # of all ranks: which one went wrong cannot be told here
    for part in all_gather([batch.ids for batch in batches]):
        for batch_ids in part:
            ids += batch_ids
    raise SystemExit(f'step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the update, what was '
                     f'saved before is good. The samples of this step: {", ".join(ids[:8])} ... ({len(ids)})')


def names_with_gradient(trainable, known):
    """The parameters, besides the known ones, that have a gradient other than zero, on any rank."""
    names = set()
    has_shards = False
    for name, p in trainable.items():
        if name in known:
            continue
        gradient = p.grad
        if isinstance(p, DTensor):
            has_shards = True
            gradient = None if gradient is None else gradient.to_local()
        if gradient is not None and gradient.any():    # zeros: it is connected and learns nothing
            names.add(name)
    return names.union(*all_gather(names)) if has_shards else names
