"""
Stage A1: align a connector, so that a frozen language model describes what a frozen vision tower sees.

reads   data_json (LLaVA-Pretrain format) and image_root, the base models llm and vision
writes  out_dir/{ckpt/,split.json,log.jsonl,golden/,predictions.jsonl,curves.png,gates.json,status.json}
done    when every gate passes; exits 1 when one does not

$ python train_a1.py configs/a1_small.py
$ torchrun --standalone --nproc_per_node=8 train_a1.py configs/a1_qwen3_8b.py
$ python train_a1.py configs/a1_small.py --resume=True
"""
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gates
from common import (Log, StopSignal, all_gather, all_sum, check_resumable, epoch_samples_for, frozen_dtype,
                    has_checkpoint, init_ranks, load_checkpoint, lock_run, peak_memory_mb, provenance, reduce_gradients,
                    save_checkpoint, seed_everything, sha256_file, sha256_tensors, tensorboard_writer, write_atomic)
from configure import configure
from data import (Ledger, Loader, Template, contact_sheet, image_reader, length_buckets, read_image, read_llava,
                  split_rows)
from model import cache_features, complete_rows, image_ablation, image_settings, load_tokenizer, load_vlm

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# what goes in and out
data_json = ''                 # LLaVA-Pretrain JSON: [{id, image, conversations}]
image_root = ''                # image paths in it are relative to this folder and stay inside it
llm = ''                       # Hugging Face folder or name of a Qwen3, kept frozen
vision = ''                    # of a SigLIP or fixed-resolution SigLIP2, kept frozen
out_dir = 'out/a1'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
max_bad_samples = 0            # more unusable samples than this end the run; up to it they go to bad_samples.jsonl
# connector
num_image_tokens = 64          # what an image costs in context: 64 places in every row
connector_width = 512
connector_depth = 2
connector_heads = 8
vision_ln = False              # a trainable LayerNorm on the tower's features
tower_layer = -1               # -1: the tower's last_hidden_state; -2: what its last block got, cheaper by a block
# training
max_seq_len = 512              # longer rows are cut at the end and counted
batch_size = 16                # rows per rank and micro-batch: memory and speed only, the result stays the same
rows_per_step = 256            # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 1e-4
warmup_frac = 0.03             # of all steps
min_lr_frac = 0.1              # the cosine ends at min_lr_frac * learning_rate
weight_decay = 0.0
grad_clip = 1.0
epochs = 1.0
epoch_minutes = 60.0           # an epoch is as many samples as this time allows, measured on this machine ...
epoch_samples = 0              # ... or exactly this many, when not 0
seed = 1
# evaluation
eval_every = 200               # steps; every evaluation saves a checkpoint
n_eval = 512                   # held-out items, balanced over short, medium and long captions
n_golden = 64                  # more held-out items, captioned at every checkpoint
n_predictions = 256            # eval items captioned at the end
bucket_edges = (10, 20)        # a short caption has up to 10 label tokens, a medium one up to 20
max_new_tokens = 64
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_ablation_nats = 0.0       # the 95 % interval of every ablation's difference must clear this
# machine
device = 'auto'
dtype = 'auto'                 # of the frozen weights: bfloat16 on CUDA, float32 on CPU; what is trained is float32
feature_cache = ''             # folder for the tower's features, each image once; '' runs the tower every step
workers = 2                    # threads that decode images
log_every = 20
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('data_json', 'image_root', 'llm', 'vision'))
# -----------------------------------------------------------------------------

# ranks
rank, world_size, device = init_ranks(device)
dtype = frozen_dtype(dtype, device)
lock = lock_run(out_dir) if rank == 0 else None
all_sum(0)                                             # nobody goes on before rank 0 has the lock
out, stop, writer = Path(out_dir), StopSignal(), tensorboard_writer(tensorboard)
if has_checkpoint(out / 'ckpt') and not resume:
    raise SystemExit(f'{out_dir} holds a checkpoint: set resume = True to go on with it, or another out_dir')
resume = resume and has_checkpoint(out / 'ckpt')

# derived values: the data
tokenizer = load_tokenizer(llm)
template = Template(tokenizer, num_image_tokens, max_seq_len)
ledger = Ledger(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
rows = [template.caption(item) for item in read_llava(data_json, image_root, ledger, captions=True)]
prepare = image_settings(vision)
read = partial(read_image, size=prepare['size'], resample=prepare['resample'])
split = partial(split_rows, rows, n_eval, n_golden, bucket_edges, out / 'split.json', ledger, read)
if rank == 0:
    split()                                            # writes the choice; the others read it
all_sum(0)
train_rows, eval_rows, golden_rows = split()

# model, and what is frozen
seed_everything(seed, 'connector')
model = {'llm': llm, 'vision': vision, 'tower_layer': tower_layer, 'shape': {
    'num_image_tokens': num_image_tokens, 'width': connector_width, 'depth': connector_depth, 'heads': connector_heads,
    'vision_ln': vision_ln}}
vlm = load_vlm(**model, dtype=dtype, device=device)
trainable = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
parts = sorted({name.split('.')[1] for name in trainable})   # the log has a gradient norm for each
frozen_sha = sha256_tensors((n, p) for n, p in vlm.named_parameters() if not p.requires_grad)
cache = cache_features(feature_cache, vlm.tower, [r.item.image for r in rows], read, device) if feature_cache else None
get_image = image_reader(read, cache)
train, evaluation, golden = (Loader(r, get_image, num_image_tokens, ledger, seed, workers)
                             for r in (train_rows, eval_rows, golden_rows))
if rank == 0:
    print(f'{len(train_rows)} samples to train on, {len(eval_rows)} to evaluate, {len(golden_rows)} golden; '
          f'connector of {sum(p.numel() for p in trainable.values()):,} parameters')

# optimizer: matrices decay, vectors do not
optimizer = torch.optim.AdamW(
    [{'params': [p for p in trainable.values() if p.ndim >= 2], 'weight_decay': weight_decay},
     {'params': [p for p in trainable.values() if p.ndim < 2], 'weight_decay': 0.0}],
    lr=learning_rate, betas=(0.9, 0.98), fused=device.type == 'cuda')
step, first_step, with_gradient = 0, 0, set()
if resume:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_sha, used)
    vlm.connector.load_state_dict(tensors['connector'])
    optimizer.load_state_dict(tensors['optimizer'])
    step = first_step = meta['step']
    epoch_samples, with_gradient = meta['epoch_samples'], set(meta['with_gradient'])


def forward_backward(batches):
    """Gradients of the whole step's loss, sum over its labels / their count over all ranks; returns the loss."""
    count = all_sum(sum(b.n_labels for b in batches))
    loss = torch.zeros((), device=device, dtype=torch.float64)
    for batch in batches:
        loss_sum = vlm(batch.to(device))
        (loss_sum / max(count, 1)).backward()
        loss += loss_sum.detach()
    reduce_gradients(trainable.values())
    return all_sum(loss) / max(count, 1), count


# schedule: how many samples an epoch of epoch_minutes holds, then cosine with warm-up
how = (rows_per_step, batch_size, rank, world_size)
if not epoch_samples:
    seconds = []
    for n, batches in enumerate(train.steps(0, 7, *how)):
        start = time.time()
        forward_backward(batches)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds += [time.time() - start] if n >= 2 else []
        optimizer.zero_grad()
    epoch_samples = epoch_samples_for(epoch_minutes, max(all_gather(seconds), key=np.median), rows_per_step)
n_steps = max(1, round(epochs * epoch_samples / rows_per_step))
if rank == 0:
    print(f'{n_steps} steps of {rows_per_step}; repeat exactly with --epoch_samples={epoch_samples}')


def lr_at(step):
    warmup = max(1, round(warmup_frac * n_steps))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


# evaluate, on every rank
def evaluate():
    """Mean loss in nats a label under each condition, by length bucket, and how often the right image wins."""
    losses = image_ablation(vlm, evaluation, batch_size, seed, rank, world_size)
    counts = np.array([len(r.labelled) for r in eval_rows])
    means = {condition: float(loss.sum() / counts.sum()) for condition, loss in losses.items()}
    means.update({name: float(losses['correct'][which].sum() / counts[which].sum())
                  for name, which in length_buckets(counts, bucket_edges).items()})
    means.update({f'win_{c}': float((losses[c] > losses['correct']).mean()) for c in losses if c != 'correct'})
    return losses, counts, means


def caption(load, path, n):
    """Caption the first n rows of a loader and write one JSON line for each."""
    rows = load.rows[:n]
    ids = complete_rows(vlm, load, [(r, r.labelled[0]) for r in rows], batch_size, max_new_tokens, [template.end],
                        rank, world_size)
    captions = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    if rank == 0:
        write_atomic(path, ''.join(json.dumps({
            'id': r.item.id, 'image': r.item.image, 'image_sha256': sha256_file(r.item.image),
            'truth': r.item.turns[-1][1], 'prediction': text}) + '\n' for r, text in zip(rows, captions)))
    return captions


# the loop
log = Log(out / 'log.jsonl', step if resume else None, active=rank == 0, writer=writer)
if not resume:
    log.write('run', stage='a1', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
              trainable=sum(p.numel() for p in trainable.values()), **provenance())
vlm.train()
window, window_start, waited = [], time.time(), 0.0
bar = tqdm(total=n_steps, initial=step, disable=None if rank == 0 else True)
coming = train.steps(step, n_steps, *how)
while True:
    # evaluate and save
    stopped = bool(stop)
    if step % eval_every == 0 or step == n_steps or stopped:
        if not stopped and not (resume and step == first_step < n_steps):
            losses, counts, means = evaluate()
            if step > first_step or not resume:        # a finished run that is judged again has this line already
                log.write('eval', step=step, **means)
            captions = caption(golden, out / 'golden' / f'step_{step:06d}.jsonl', n_golden)
            if rank == 0:
                bar.write(f'step {step}: held-out loss {means["correct"]:.4f} with the right image, '
                          f'{means["shuffled"]:.4f} another one, {means["zero"]:.4f} zeros, {means["noise"]:.4f} noise')
                contact_sheet(out / 'golden' / f'step_{step:06d}.png', [r.item.image for r in golden_rows], captions)
        if rank == 0 and step > first_step:
            tensors = {'connector': vlm.connector.state_dict(), 'optimizer': optimizer.state_dict()}
            save_checkpoint(out / 'ckpt', tensors, {
                'stage': 'a1', 'model': model, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
                'settings': config, 'frozen_sha256': frozen_sha, 'with_gradient': sorted(with_gradient)})
        if rank == 0:
            write_atomic(out / 'status.json', json.dumps(
                {'state': 'stopped' if stopped else 'running', 'step': step, 'n_steps': n_steps}))
        window_start = time.time()
    # stop
    if stopped:
        raise SystemExit(f'{stop.name or "another rank"} stopped this run: saved at step {step}, '
                         'go on with --resume=True')
    if step == n_steps:
        break
    # learning rate
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    # fetch
    start = time.time()
    batches = next(coming)
    waited += time.time() - start
    # forward and backward
    seed_everything(seed, step, rank)
    loss, count = forward_backward(batches)
    # step
    squares = {part: sum(p.grad.double().square().sum() for n, p in trainable.items()
                         if n.startswith(f'connector.{part}') and p.grad is not None) for part in parts}
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    grad_norm = math.sqrt(sum(squares.values()))
    if not math.isfinite(loss + grad_norm):
        ids = [i for part in all_gather([i for b in batches for i in b.ids]) for i in part]
        raise SystemExit(f'step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the update, the last '
                         f'checkpoint is good. The samples of this step: {", ".join(ids[:8])} ... ({len(ids)})')
    if len(with_gradient) < len(trainable):
        with_gradient |= {n for n, p in trainable.items() if p.grad is not None and p.grad.any()}
    for p in (p for p in trainable.values() if p.grad is not None):
        p.grad.mul_(min(1.0, grad_clip / (grad_norm + 1e-6)))
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    bar.update()
    # log
    window.append((loss * count, count, sum(len(b.input_ids) for b in batches), sum(len(b.ids) for b in batches)))
    if step % log_every == 0 or step == n_steps:
        seconds, (nats, labels, tokens, samples) = time.time() - window_start, map(sum, zip(*window))
        record = {'step': step, 'loss': loss, 'window_loss': nats / labels, 'lr': lr, 'grad_norm': grad_norm,
                  **{f'grad_norm_{part}': norm for part, norm in norms.items()},
                  'tokens_per_s': tokens * world_size / seconds, 'labels_per_s': labels / seconds,
                  'samples_per_s': samples * world_size / seconds, 'data_wait': waited / seconds,
                  'peak_memory_mb': peak_memory_mb(device)}
        log.write('step', **record)
        if rank == 0:
            bar.write(f'step {step}/{n_steps}: loss {nats / labels:.4f}, gradient {grad_norm:.3f}, lr {lr:.2e}, '
                      f'{record["samples_per_s"]:.0f} samples/s, {record["data_wait"]:.0%} waiting for data')
        window, window_start, waited = [], time.time(), 0.0
bar.close()

# gates
caption(evaluation, out / 'predictions.jsonl', n_predictions)
status = 0
if rank == 0:
    frozen_now = sha256_tensors((n, p) for n, p in vlm.named_parameters() if n not in trainable)
    declared = {f'connector.{n}' for n, _ in vlm.connector.named_parameters()}
    verdicts = [gates.ablation(f'{c} image costs more than the right one', losses['correct'], losses[c], counts,
                               gate_ablation_nats)[0] for c in ('shuffled', 'zero', 'noise')]
    verdicts += [gates.ablation('zeros cost more than another image', losses['shuffled'], losses['zero'], counts)[0],
                 gates.at_most('share of truncated samples', np.mean([r.truncated for r in rows]), gate_truncated),
                 gates.exactly('samples without a label', sum(len(r.labelled) == 0 for r in rows), 0),
                 *gates.trained_set(declared, trainable, with_gradient, frozen_sha, frozen_now)]
    gates.curves(out / 'log.jsonl', out / 'curves.png')
    status = gates.conclude(out, verdicts, losses=means)
    write_atomic(out / 'status.json', json.dumps({'state': 'finished', 'step': step, 'n_steps': n_steps}))
sys.exit(int(all_sum(status)))
