"""
Stage B3: teach a frozen language model its new vocabulary rows, for images and sounds as it reads and writes them.

reads   shards_dir from build_b2.py, the base model llm, text_jsonl
writes  out_dir/{trainable_rows.pt,trainable_rows.json,token_space.json,export/,ckpt/,log.jsonl,golden/,curves.png,
        gates.json,status.json}
done    when every gate passes; exits 1 when one does not

$ python train_b3.py configs/b3_small.py
$ torchrun --standalone --nproc_per_node=8 train_b3.py configs/b3_qwen3_8b.py
$ python train_b3.py configs/b3_small.py --resume=True
"""
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from tqdm import tqdm

import gates
from common import (Log, StopSignal, all_gather, all_sum, check_resumable, epoch_samples_for, frozen_dtype,
                    has_checkpoint, init_ranks, load_checkpoint, lock_run, peak_memory_mb, provenance, reduce_gradients,
                    save_checkpoint, seed_everything, sha256_tensors, tensorboard_writer, write_atomic)
from configure import configure
from data import Loader, Template, contact_sheet, mixture, read_shards, read_texts, token_row
from model import load_tokenizer
from token_model import (export, export_difference, load_token_lm, random_media, read_text, row_losses, save_rows,
                    swapped_media, text_difference, training_bytes, write_codes)
from uti import TASKS, UTI, Grammar, TokenSpace, tokenizer_sha256

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# what goes in and out
shards_dir = ''                # train, eval and golden items, with the token space that they were made for
llm = ''                       # Hugging Face folder or name of the Qwen3 of that token space, kept frozen
image_codec = ''               # both of the token space, to decode what is drawn and sounded; '' keeps the codes only
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''
audio_prefix = ''
text_jsonl = ''                # lines of {"text": ...}: their probabilities have to stay as they are
out_dir = 'out/b3'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
allow_failed_gates = False     # True: take shards whose gates failed
# rows
typed_head = True              # a label's loss over its own range; False: over every id, for other engines
rows_noise = 0.02              # new rows start at the mean text row plus noise of this deviation
task_weights = {'i2t': 1.0, 'a2t': 1.0, 't2i': 1.0, 't2a': 1.0}   # shares of the rows; an image weighs many labels
# training
max_seq_len = 2048             # longer rows lose the end of their text, never codes, and are counted
batch_size = 16                # rows per rank and micro-batch: memory and speed only, the result stays the same
rows_per_step = 256            # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 1e-3
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
n_eval = 512                   # held-out items of each task
n_golden = 64                  # more of them, described, drawn and sounded at every checkpoint
n_text = 64                    # texts that the base model and this one are compared on
max_new_tokens = 64            # of a description
temperature = 1.0              # of drawing and sounding
guidance = 1.0                 # above 1 the prompt counts more; training has no prompt dropout yet, so 1 here
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.0                # largest difference of a text log probability; with typed_head it is exactly 0
gate_swap_nats = 0.10          # another item's media must cost this much a label, its 95 % interval above it ...
gate_swap_win = 0.80           # ... and cost more than the right one in this share of the items
gate_random_nats = 0.15        # the same for random codes
gate_random_win = 0.85
# machine
device = 'auto'
dtype = 'auto'                 # of the frozen weights: bfloat16 on CUDA, float32 on CPU; what is trained is float32
log_every = 20
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('shards_dir', 'llm', 'text_jsonl'))
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
gates.require_passed(shards_dir, allow_failed_gates)
space = TokenSpace.load(Path(shards_dir) / 'token_space.json')
grammar, tokenizer = Grammar(space), load_tokenizer(llm)
unknown = [task for task in task_weights if TASKS.get(task, (None,))[0] not in grammar.payload_ranges]
if unknown or min(task_weights.values(), default=-1) < 0 or not any(task_weights.values()):
    raise SystemExit(f'task_weights = {task_weights}: wanted shares of the tasks that this token space has codes for')
if tokenizer_sha256(tokenizer) != space.base['tokenizer_sha256']:
    raise SystemExit(f'{llm} has another tokenizer than {shards_dir} was made with: take the base model of stage B1')
tasks = [task for task, weight in task_weights.items() if weight]


def rows_of(split, n=None):
    """{task: [Row]} of the first n items of each task in a split of the shards."""
    records = read_shards(shards_dir, split, space)
    return {task: [token_row(record, task, grammar, max_seq_len)
                   for record in [r for r in records if r.modality == TASKS[task][0]][:n]] for task in tasks}


train_rows, eval_rows, golden_rows = rows_of('train'), rows_of('eval', n_eval), rows_of('golden', n_golden)
short = [task for task in tasks if not train_rows[task] or len(eval_rows[task]) < 8]
if short:
    raise SystemExit(f'{shards_dir} has {len(train_rows[short[0]])} items to train and {len(eval_rows[short[0]])} to '
                     f'evaluate {short[0]} on: add data, or set its task_weights to 0')
template = Template(tokenizer, 0, max_seq_len)
texts = [template.text(text, f'text {n}') for n, text in enumerate(read_texts(text_jsonl)[:n_text]) if text]

# model, and what is frozen
seed_everything(seed, 'rows')
model = {'llm': llm, 'typed_head': typed_head}
lm = load_token_lm(llm, space, typed_head, rows_noise, dtype, device)
trainable = {name: p for name, p in lm.named_parameters() if p.requires_grad}
frozen_sha = sha256_tensors((n, p) for n, p in lm.named_parameters() if not p.requires_grad)
touched = {name: torch.zeros(len(p), dtype=torch.bool, device=device) for name, p in trainable.items()}
train = Loader(mixture(train_rows, task_weights, seed), None, 0, None, seed)
if rank == 0:
    print(f'{len(train.rows)} rows to train on, {sum(map(len, eval_rows.values()))} to evaluate; '
          f'{space.n_new} new rows twice, {sum(p.numel() for p in trainable.values()):,} parameters')

codecs = None
if rank == 0 and (image_codec or audio_codec):
    codecs = UTI.of_space(space, shards_dir, llm, image_codec, audio_codec, image_prefix, audio_prefix, device)

# optimizer: its state is for the new rows alone
optimizer = torch.optim.AdamW(trainable.values(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay,
                              fused=device.type == 'cuda')
step, first_step, with_gradient = 0, 0, set()
if resume:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_sha, used)
    space.require(TokenSpace(*(meta['token_space'][name] for name in ('base', 'image', 'audio'))), used)
    lm.load_rows(tensors['rows'], used)
    optimizer.load_state_dict(tensors['optimizer'])
    touched = tensors['touched']
    step = first_step = meta['step']
    epoch_samples, with_gradient = meta['epoch_samples'], set(meta['with_gradient'])


def forward_backward(batches):
    """Gradients of the whole step's loss, sum over its labels / their count over all ranks; returns the loss."""
    count = all_sum(sum(b.n_labels for b in batches))
    loss = torch.zeros((), device=device, dtype=torch.float64)
    for batch in batches:
        loss_sum = lm(batch.to(device))
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
    """Mean loss in nats a label of each task; of reading also with another item's media and with random codes."""
    losses, counts, means = {}, {}, {}
    for task, rows in eval_rows.items():
        modality, way = TASKS[task]
        conditions = {'correct': rows}
        if way == 'read':
            conditions['swapped'] = swapped_media(rows, grammar.length(modality), seed)
            conditions['random'] = random_media(rows, grammar, modality, seed)
        counts[task] = np.array([len(r.labelled) for r in rows])
        losses[task] = {c: row_losses(lm, r, batch_size, rank, world_size) for c, r in conditions.items()}
        means.update({f'{task}_{c}': float(loss.sum() / counts[task].sum()) for c, loss in losses[task].items()})
        means.update({f'{task}_win_{c}': float((loss > losses[task]['correct']).mean())
                      for c, loss in losses[task].items() if c != 'correct'})
    return losses, counts, means


def generate_golden(folder):
    """Describe, draw and sound the golden items; one JSONL a task, a line an item."""
    lm.eval()
    for task, rows in golden_rows.items():
        modality, way = TASKS[task]
        mine, done = list(range(rank, len(rows), world_size)), {}
        for part in (mine[i:i + batch_size] for i in range(0, len(mine), batch_size)):
            records = [rows[i].item for i in part]
            if way == 'read':
                ids = read_text(lm, grammar, task, [r.payload for r in records], max_new_tokens)
                said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            else:
                said = write_codes(lm, grammar, task, [r.text.tolist() for r in records], temperature,
                                   guidance=guidance, seeds=part).tolist()
            done.update(zip(part, said))
        done = {i: said for part in all_gather(done) for i, said in part.items()}
        if rank == 0:
            write_atomic(folder / f'{task}.jsonl', ''.join(json.dumps({
                'id': row.item.id, 'media_sha256': row.item.media, 'truth': tokenizer.decode(row.item.text),
                'prediction' if way == 'read' else 'codes': done[i]}) + '\n' for i, row in enumerate(rows)))
            if way == 'write' and codecs:
                show(folder / task, modality, [row.item for row in rows], [done[i] for i in range(len(rows))])
    lm.train()


def show(folder, modality, records, codes):
    """Decode what was drawn or sounded: a file an item, and of pictures one sheet with their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    decode = codecs.decode_image if modality == 'image' else codecs.decode_audio
    files = [folder / f'{n:03d}.{"png" if modality == "image" else "wav"}' for n in range(len(records))]
    for file, made in zip(files, decode(np.array(codes), [record.meta for record in records])):
        if modality == 'image':
            Image.fromarray(made.transpose(1, 2, 0)).save(file)
        else:
            soundfile.write(file, made, space.audio['sample_rate'])
    if modality == 'image':
        contact_sheet(f'{folder}.png', files, [tokenizer.decode(record.text) for record in records])


# the loop
log = Log(out / 'log.jsonl', step if resume else None, active=rank == 0, writer=writer)
if not resume:
    log.write('run', stage='b3', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
              trainable=sum(p.numel() for p in trainable.values()), token_space=space.sha256, **provenance())
lm.train()
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
            generate_golden(out / 'golden' / f'step_{step:06d}')
            if rank == 0:
                bar.write(f'step {step}: held-out loss ' + ', '.join(
                    f'{name.replace("_correct", "")} {loss:.4f}' for name, loss in means.items() if 'win' not in name))
        if rank == 0 and step > first_step:
            tensors = {'rows': lm.rows_state(), 'optimizer': optimizer.state_dict(), 'touched': touched}
            save_checkpoint(out / 'ckpt', tensors, {
                'stage': 'b3', 'model': model, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
                'settings': config, 'frozen_sha256': frozen_sha, 'with_gradient': sorted(with_gradient),
                'token_space': space.fields()})
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
    squares = {n: p.grad.double().square().sum() for n, p in trainable.items() if p.grad is not None}
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    grad_norm = math.sqrt(sum(squares.values()))
    if not math.isfinite(loss + grad_norm):
        ids = [i for part in all_gather([i for b in batches for i in b.ids]) for i in part]
        raise SystemExit(f'step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the update, the last '
                         f'checkpoint is good. The samples of this step: {", ".join(ids[:8])} ... ({len(ids)})')
    if len(with_gradient) < len(trainable):
        with_gradient |= {n for n, p in trainable.items() if p.grad is not None and p.grad.any()}
    for n, p in ((n, p) for n, p in trainable.items() if p.grad is not None):
        touched[n] |= p.grad.any(1)
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
text = text_difference(lm, texts, rank, world_size)
status = 0
if rank == 0:
    frozen_now = sha256_tensors((n, p) for n, p in lm.named_parameters() if n not in trainable)
    verdicts = [gates.at_most('text log probabilities, largest difference from the base', text, gate_text)]
    ablations = {}
    for task in (task for task in tasks if TASKS[task][1] == 'read'):
        for condition, what, nats, win in (('swapped', "another item's media", gate_swap_nats, gate_swap_win),
                                           ('random', 'random codes', gate_random_nats, gate_random_win)):
            verdict, measured = gates.ablation(f'{task}: {what} cost more than the right ones', losses[task]['correct'],
                                               losses[task][condition], counts[task], nats, win)
            verdicts += [verdict]
            ablations[f'{task}_{condition}'] = measured
    every = [r for split in (train_rows, eval_rows, golden_rows) for rows in split.values() for r in rows]
    save_rows(lm, out, stage='b3', step=step, base_sha256=frozen_sha,
              rows_with_gradient={n: int(rows.sum()) for n, rows in touched.items()})
    export(lm, tokenizer, out / 'export')
    drift = export_difference(lm, out / 'export', [rows[0] for rows in eval_rows.values()])
    verdicts += [gates.exactly('exported logits, largest difference in a stock load', drift, 0),
                 gates.at_most('share of truncated samples', np.mean([r.truncated for r in every]), gate_truncated),
                 gates.exactly('samples without a label', sum(len(r.labelled) == 0 for r in every), 0),
                 gates.exactly('optimizer state beyond the new rows', len(
                     set(optimizer.state) - {lm.new_in, lm.new_out}), 0),
                 *gates.trained_set({'new_in', 'new_out'}, trainable, with_gradient, frozen_sha, frozen_now)]
    gates.curves(out / 'log.jsonl', out / 'curves.png', [f'{task}_correct' for task in tasks])
    status = gates.conclude(out, verdicts, losses=means, ablations=ablations, bytes=training_bytes(lm, optimizer))
    write_atomic(out / 'status.json', json.dumps({'state': 'finished', 'step': step, 'n_steps': n_steps}))
sys.exit(int(all_sum(status)))
