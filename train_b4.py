"""
Stage B4: multimodal token pretraining. The model learns to draw and to sound what a text says, and goes on describing
what it sees and hears: LoRA on the language model, or its layers themselves, beside the new rows.

reads   shards_dir from build_b2.py, a finished B3 out dir (rows, base model, token space), text_jsonl for the text-only
        regression and, if set, replay_jsonl to train on beside the tasks
writes  out_dir/{trainable_rows.pt,trainable_rows.json,token_space.json,adapter/,ckpt/,log.jsonl,golden/,predictions/,
        curves.png,gates.json,status.json}; adapter/ is in PEFT's format, with full_tune it is export/, a whole model
done    when every gate passes; exits 1 when one does not

$ python train_b4.py configs/b4_small.py
$ torchrun --standalone --nproc_per_node=8 train_b4.py configs/b4_qwen3_8b.py
$ python train_b4.py configs/b4_small.py --resume=True
"""
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm import tqdm

import gates
from common import (Log, StopSignal, all_gather, all_sum, check_resumable, epoch_samples_for, frozen_dtype,
                    has_checkpoint, init_ranks, load_checkpoint, lock_run, peak_memory_mb, provenance, reduce_gradients,
                    save_checkpoint, seed_everything, sha256_tensors, tensorboard_writer, write_atomic)
from configure import configure
from data import Curriculum, Template, contact_sheet, ramped, read_shards, read_texts, token_row, with_prompt
from model import load_tokenizer
from token_model import (export, load_rows, load_token_lm, random_media, read_text, row_losses, row_sums, save_rows,
                    swapped_media, swapped_prompts, write_codes)
from uti import TASKS, UTI, Grammar, TokenSpace, tokenizer_sha256

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# what goes in and out
shards_dir = ''                # train, eval and golden items, with the token space that they were made for
rows_dir = ''                  # out dir of the B3 run to start from: its rows, its base model, its typed_head
image_codec = ''               # both of the token space, to decode what is drawn and sounded
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''
audio_prefix = ''
text_jsonl = ''                # held-out plain text, {"text": ...} a line: what must not get worse
replay_jsonl = ''              # plain text to train on beside the tasks, so that text stays what it was; '' for none
replay_share = 0.2             # of the rows, when there is a replay_jsonl
out_dir = 'out/b4'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
allow_failed_gates = False     # True: take shards, or a B3 run, whose gates failed
# what learns beside the new rows: LoRA on the language model only, or its layers
full_tune = False              # True: no LoRA, the layers and the last norm learn; text rows and head stay frozen
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
lora_targets = r'model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)'   # full paths
# curriculum
task_weights = {'i2t': 1.0, 'a2t': 1.0, 't2i': 2.0, 't2a': 2.0}   # shares of the rows; an image weighs many labels
task_weights_start = {}        # the shares go from these to task_weights, in a straight line; {} for no ramp ...
ramp_frac = 0.2                # ... over this part of all steps
prompt_dropout = 0.1           # share of writing rows without their prompt: what guidance above 1 needs
# training
max_seq_len = 2048             # longer rows lose the end of their text, never codes, and are counted
batch_size = 16                # rows per rank and micro-batch: memory and speed only, the result stays the same
rows_per_step = 256            # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 1e-4           # of the new rows
lora_learning_rate = 2e-4      # of LoRA, or of the layers with full_tune
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
n_predictions = 256            # eval items of each task described, drawn and sounded at the end
n_text = 512                   # texts for the text-only regression
max_new_tokens = 64            # of a description
temperature = 1.0              # of drawing and sounding
guidance = (1.0,)              # above 1 the prompt counts more; predictions with each of these, all else with the first
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.01               # the text-only loss may rise by this share over the base model's
gate_swap_nats = 0.10          # another item's media must cost this much a label, its 95 % interval above it ...
gate_swap_win = 0.80           # ... and cost more than the right one in this share of the items
gate_random_nats = 0.15        # the same for random codes
gate_random_win = 0.85
gate_prompt_nats = 0.0         # the same for another item's prompt, in the tasks that write
gate_prompt_win = 0.70
gate_empty_nats = 0.10         # the same for no prompt
gate_empty_win = 0.80
gate_items = 256               # held-out items that each of these is measured on, at least
gate_read_points = 2.0         # reading labels with more than half of the probability: points that may be lost since B3
gate_distinct = 0.5            # share of different outputs among the predictions
gate_pixel_std = 10.0          # of a picture's pixels, of 255
gate_rms = 0.01                # of a sound's samples, of 1
gate_spectral_std = 6.0        # of a sound's spectrum, in dB; noise has about 5
# machine
device = 'auto'
dtype = 'auto'                 # of the frozen weights: bfloat16 on CUDA, float32 on CPU; what is trained is float32
log_every = 20
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('shards_dir', 'rows_dir', 'text_jsonl'))
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

# derived values: the B3 run, then the data
for folder in shards_dir, rows_dir:
    gates.require_passed(folder, allow_failed_gates)
model = load_checkpoint(Path(rows_dir) / 'ckpt', 'cpu')[1]['model']
llm = model['llm']
space = TokenSpace.load(Path(shards_dir) / 'token_space.json')
grammar, tokenizer = Grammar(space), load_tokenizer(llm)
task_weights_start = task_weights_start or task_weights
for weights in task_weights, task_weights_start:
    unknown = [task for task in weights if TASKS.get(task, (None,))[0] not in grammar.payload_ranges]
    if unknown or min(weights.values(), default=-1) < 0 or not any(weights.values()):
        raise SystemExit(f'task weights {weights}: wanted shares of the tasks that this token space has codes for')
if tokenizer_sha256(tokenizer) != space.base['tokenizer_sha256']:
    raise SystemExit(f'{llm} has another tokenizer than {shards_dir} was made with: take the base model of stage B1')
if not 0 <= prompt_dropout < 1 or not 0 <= replay_share < 1 or not guidance:
    raise SystemExit(f'prompt_dropout = {prompt_dropout}, replay_share = {replay_share}, guidance = {guidance}: '
                     'wanted shares from 0 to below 1 and at least one guidance')
tasks = [task for task, share in ramped(task_weights_start, task_weights, 0.5).items() if share]


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


def text_rows(path, n=None):
    """[Row] of the first n texts of a file, but for those of a single id, which leave nothing to predict."""
    template = Template(tokenizer, 0, max_seq_len)
    rows = [template.text(text, f'text {k}') for k, text in enumerate(read_texts(path)[:n])]
    return [row for row in rows if len(row.labelled)]


texts = text_rows(text_jsonl, n_text)
if replay_jsonl:
    train_rows['text'] = text_rows(replay_jsonl)

# model, and what is frozen
seed_everything(seed, 'lora')
lm = load_token_lm(**model, space=space, dtype=dtype, device=device)
base_sha = sha256_tensors((n, p) for n, p in lm.named_parameters() if not p.requires_grad)
if load_rows(lm, rows_dir)['base_sha256'] != base_sha:
    raise SystemExit(f'{rows_dir} was made on other weights than those of {llm} today, or in another dtype: '
                     'restore them, or run B3 again')
if full_tune:
    for part in lm.llm.model.layers, lm.llm.model.norm:
        part.float().requires_grad_(True)              # in float32: these weights are their own masters
else:
    try:
        adapter = get_peft_model(lm.llm, LoraConfig(r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                                                    target_modules=lora_targets, task_type='CAUSAL_LM'))
    except ValueError as e:
        raise SystemExit(f'lora_targets = {lora_targets!r}: {e}')
trainable = {name: p for name, p in lm.named_parameters() if p.requires_grad}
parts = {'rows': 'new_', 'lora': 'llm.'}               # for the log: a gradient norm for each


def frozen_now():
    """sha256 of everything that does not learn, by the names that it has without LoRA."""
    return sha256_tensors((n.replace('base_layer.', ''), p) for n, p in lm.named_parameters() if n not in trainable)


def tuned_state():
    """What has been learned beside the rows, {name: tensor}."""
    if not full_tune:
        return get_peft_model_state_dict(adapter)
    return {name: p.detach() for name, p in trainable.items() if name.startswith('llm.')}


def load_tuned(state):
    if not full_tune:
        set_peft_model_state_dict(adapter, state)
        return
    with torch.no_grad():
        for name, p in state.items():
            trainable[name].copy_(p)


frozen_sha = frozen_now()
if rank == 0:
    print(f'{sum(map(len, train_rows.values()))} rows to train on, {sum(map(len, eval_rows.values()))} to evaluate; '
          f'new rows and {"layers" if full_tune else "LoRA"} of {sum(p.numel() for p in trainable.values()):,} '
          'parameters')

if rank == 0:
    codecs = UTI.of_space(space, shards_dir, llm, image_codec, audio_codec, image_prefix, audio_prefix, device)

# optimizer: a learning rate for the rows and one for the rest; matrices decay, vectors do not
optimizer = torch.optim.AdamW(
    [{'params': [p for n, p in trainable.items() if n.startswith(prefix) and (p.ndim >= 2) == matrices],
      'weight_decay': weight_decay * matrices, 'peak': peak}
     for prefix, peak in (('new_', learning_rate), ('llm.', lora_learning_rate)) for matrices in (True, False)],
    betas=(0.9, 0.98), fused=device.type == 'cuda')
optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]
step, first_step, with_gradient, at_start = 0, 0, set(), None
if resume:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_sha, used)
    space.require(TokenSpace(*(meta['token_space'][name] for name in ('base', 'image', 'audio'))), used)
    lm.load_rows(tensors['rows'], used)
    load_tuned(tensors['tuned'])
    optimizer.load_state_dict(tensors['optimizer'])
    step = first_step = meta['step']
    epoch_samples, with_gradient = meta['epoch_samples'], set(meta['with_gradient'])
    at_start = meta['start']


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


def shares_at(step, n_steps):
    """{task: share of the rows} at a step; replayed text has the same share all along."""
    ramp = ramp_frac * n_steps
    mixed = ramped(task_weights_start, task_weights, min(1.0, step / ramp) if ramp else 1.0)
    text = replay_share if replay_jsonl else 0.0
    return {**{task: share * (1 - text) for task, share in mixed.items()}, 'text': text}


def curriculum(n_steps):
    return Curriculum(train_rows, [shares_at(step, n_steps) for step in range(n_steps)], rows_per_step,
                      prompt_dropout, [task for task in tasks if TASKS[task][1] == 'write'], seed)


if not epoch_samples:
    seconds = []
    for n, batches in enumerate(curriculum(7).steps(0, 7, *how)):
        start = time.time()
        forward_backward(batches)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds += [time.time() - start] if n >= 2 else []
        optimizer.zero_grad()
    epoch_samples = epoch_samples_for(epoch_minutes, max(all_gather(seconds), key=np.median), rows_per_step)
n_steps = max(1, round(epochs * epoch_samples / rows_per_step))
train = curriculum(n_steps)
if rank == 0:
    print(f'{n_steps} steps of {rows_per_step}; repeat exactly with --epoch_samples={epoch_samples}')


def lr_at(step):                                       # as a share of each group's peak
    warmup = max(1, round(warmup_frac * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))


# evaluate, on every rank
def evaluate():
    """Mean loss in nats a label of each task and of text; of reading also with another item's media and with random
    codes, of writing with another item's prompt and with none. {task}_right: share of its labels that get more than
    half of the probability."""
    losses, counts, means = {}, {}, {}
    for task, rows in eval_rows.items():
        modality, way = TASKS[task]
        if way == 'read':
            others = {'swapped': swapped_media(rows, grammar.length(modality), seed),
                      'random': random_media(rows, grammar, modality, seed)}
        else:
            others = {'swapped': swapped_prompts(rows, seed), 'empty': [with_prompt(row, ()) for row in rows]}
        counts[task] = np.array([len(r.labelled) for r in rows])
        correct, right = row_sums(lm, rows, batch_size, rank, world_size)
        losses[task] = {'correct': correct, **{c: row_losses(lm, r, batch_size, rank, world_size)
                                               for c, r in others.items()}}
        means.update({f'{task}_{c}': float(loss.sum() / counts[task].sum()) for c, loss in losses[task].items()})
        means.update({f'{task}_win_{c}': float((losses[task][c] > correct).mean()) for c in others})
        means[f'{task}_right'] = float(right.sum() / counts[task].sum())
    nats = row_losses(lm, texts, batch_size, rank, world_size).sum()
    means['text'] = float(nats / sum(len(r.labelled) for r in texts))
    return losses, counts, means


def complete(task, rows, place, guide):
    """Describe, draw or sound the items of these rows: place.jsonl, a line an item, and what was made in place/.
    Returns the codes that were written and what they decode to, on rank 0."""
    lm.eval()
    modality, way = TASKS[task]
    mine, done = list(range(rank, len(rows), world_size)), {}
    for part in (mine[i:i + batch_size] for i in range(0, len(mine), batch_size)):
        records = [rows[i].item for i in part]
        if way == 'read':
            ids = read_text(lm, grammar, task, [r.payload for r in records], max_new_tokens)
            said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        else:
            said = write_codes(lm, grammar, task, [r.text.tolist() for r in records], temperature, guidance=guide,
                               seeds=part).tolist()
        done.update(zip(part, said))
    lm.train()
    done = {i: said for part in all_gather(done) for i, said in part.items()}
    if rank != 0:
        return [], []
    said = [done[i] for i in range(len(rows))]
    write_atomic(Path(f'{place}.jsonl'), ''.join(json.dumps({
        'id': row.item.id, 'media_sha256': row.item.media, 'truth': tokenizer.decode(row.item.text),
        'prediction' if way == 'read' else 'codes': one}) + '\n' for row, one in zip(rows, said)))
    return (said, show(place, modality, [row.item for row in rows], said)) if way == 'write' else ([], [])


def show(folder, modality, records, codes):
    """Decode what was drawn or sounded: a file an item, and of pictures one sheet with the first prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    decode, made = codecs.decode_image if modality == 'image' else codecs.decode_audio, []
    files = [folder / f'{n:03d}.{"png" if modality == "image" else "wav"}' for n in range(len(records))]
    for n in range(0, len(codes), batch_size):
        made += decode(np.array(codes[n:n + batch_size]), [record.meta for record in records[n:n + batch_size]])
    for file, one in zip(files, made):
        if modality == 'image':
            Image.fromarray(one.transpose(1, 2, 0)).save(file)
        else:
            soundfile.write(file, one, space.audio['sample_rate'])
    if modality == 'image':
        contact_sheet(f'{folder}.png', files[:64], [tokenizer.decode(record.text) for record in records[:64]])
    return made


# the loop
log = Log(out / 'log.jsonl', step if resume else None, active=rank == 0, writer=writer)
if not resume:
    log.write('run', stage='b4', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
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
            at_start = at_start or means               # of the B3 run: LoRA begins as nothing
            golden = {task: complete(task, rows, out / 'golden' / f'step_{step:06d}' / task, guidance[0])
                      for task, rows in golden_rows.items()}
            if rank == 0:
                bar.write(f'step {step}: held-out loss ' + ', '.join(
                    f'{name.replace("_correct", "")} {loss:.4f}' for name, loss in means.items()
                    if not {'win', 'right'} & set(name.split('_'))))
        if rank == 0 and step > first_step:
            tensors = {'rows': lm.rows_state(), 'tuned': tuned_state(), 'optimizer': optimizer.state_dict()}
            save_checkpoint(out / 'ckpt', tensors, {
                'stage': 'b4', 'model': model, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
                'settings': config, 'frozen_sha256': frozen_sha, 'with_gradient': sorted(with_gradient),
                'token_space': space.fields(), 'start': at_start})
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
        group['lr'] = lr * group['peak']
    # fetch
    start = time.time()
    batches = next(coming)
    waited += time.time() - start
    # forward and backward
    seed_everything(seed, step, rank)
    loss, count = forward_backward(batches)
    # step
    squares = {part: sum(p.grad.double().square().sum() for n, p in trainable.items() if n.startswith(prefix)
                         and p.grad is not None) for part, prefix in parts.items()}
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
        record = {'step': step, 'loss': loss, 'window_loss': nats / labels, 'lr': lr * learning_rate,
                  'lr_lora': lr * lora_learning_rate, 'grad_norm': grad_norm,
                  **{f'grad_norm_{part}': norm for part, norm in norms.items()},
                  'tokens_per_s': tokens * world_size / seconds, 'labels_per_s': labels / seconds,
                  'samples_per_s': samples * world_size / seconds, 'data_wait': waited / seconds,
                  'peak_memory_mb': peak_memory_mb(device),
                  **{f'share_{task}': share for task, share in shares_at(step - 1, n_steps).items()}}
        log.write('step', **record)
        if rank == 0:
            bar.write(f'step {step}/{n_steps}: loss {nats / labels:.4f}, gradient {grad_norm:.3f}, lr x {lr:.3f}, '
                      f'{record["samples_per_s"]:.0f} samples/s, {record["data_wait"]:.0%} waiting for data')
        window, window_start, waited = [], time.time(), 0.0
bar.close()

# gates
predicted = {}
for task, rows in eval_rows.items():
    for guide in guidance if TASKS[task][1] == 'write' else guidance[:1]:
        name = task if guide == guidance[0] else f'{task}_guidance_{guide:g}'
        predicted[name] = complete(task, rows[:n_predictions], out / 'predictions' / name, guide)
status = 0
if rank == 0:
    verdicts = [gates.at_most('text-only loss, rise over the base model', means['text'] / at_start['text'] - 1,
                              gate_text)]
    ablations = {}
    for task, rows in eval_rows.items():
        modality, way = TASKS[task]
        others = (('swapped', "another item's media cost more than the right ones", gate_swap_nats, gate_swap_win),
                  ('random', 'random codes cost more than the right ones', gate_random_nats, gate_random_win)
                  ) if way == 'read' else (
            ('swapped', "another item's prompt costs more than the right one", gate_prompt_nats, gate_prompt_win),
            ('empty', 'no prompt costs more than the right one', gate_empty_nats, gate_empty_win))
        for condition, what, nats, win in others:
            verdict, measured = gates.ablation(f'{task}: {what}', losses[task]['correct'], losses[task][condition],
                                               counts[task], nats, win)
            verdicts += [verdict]
            ablations[f'{task}_{condition}'] = measured
        if way == 'read':
            verdicts += [gates.at_most(f'{task}: points of right labels lost since B3', 100 * (
                at_start[f'{task}_right'] - means[f'{task}_right']), gate_read_points)]
            continue
        shapes = [(3, *[space.image['size']] * 2) if modality == 'image' else (row.item.meta['n_samples'],)
                  for row in golden_rows[task]]
        bars = {'pixel_std': gate_pixel_std} if modality == 'image' else {
            'rms': gate_rms, 'spectral_std': gate_spectral_std}
        verdicts += [gates.at_least(f'{task}: held-out items', len(rows), gate_items),
                     *gates.written(task, [*golden[task][0], *predicted[task][0]], *grammar.bounds(
                         grammar.payload_ranges[modality]), golden[task][1], shapes, n_golden),
                     *gates.collapse(task, *predicted[task], gate_distinct, **bars)]
    every = [r for split in (train_rows, eval_rows, golden_rows) for rows in split.values() for r in rows]
    declared = {n for n, _ in lm.named_parameters() if n.startswith('new_') or '.lora_' in n
                or full_tune and n.startswith(('llm.model.layers.', 'llm.model.norm.'))}
    verdicts += [gates.at_most('share of truncated samples', np.mean([r.truncated for r in every]), gate_truncated),
                 gates.exactly('samples without a label', sum(len(r.labelled) == 0 for r in every), 0),
                 gates.exactly("LoRA weights outside the language model's layers", sum(
                     'lora_' in n and not n.startswith('llm.model.layers.') for n, _ in lm.named_parameters()), 0),
                 *gates.trained_set(declared, trainable, with_gradient, frozen_sha, frozen_now())]
    save_rows(lm, out, stage='b4', step=step, base_sha256=base_sha)
    if full_tune:
        lm.llm.to(dtype)                               # as the base was
        export(lm, tokenizer, out / 'export')
    else:
        adapter.save_pretrained(out / 'adapter')
    gates.curves(out / 'log.jsonl', out / 'curves.png', [f'{task}_correct' for task in tasks])
    status = gates.conclude(out, verdicts, losses=means, start=at_start, ablations=ablations)
    write_atomic(out / 'status.json', json.dumps({'state': 'finished', 'step': step, 'n_steps': n_steps}))
sys.exit(int(all_sum(status)))
