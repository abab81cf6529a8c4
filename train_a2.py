"""
Stage A2: visual instruction tuning. Connector and LoRA turn the aligned model into one that answers about a picture.

reads   data_json (LLaVA-Instruct format) and image_root, a finished A1 out dir, text_jsonl for the text-only regression
        and, if set, replay_jsonl to train on beside the chats
writes  out_dir/{ckpt/,adapter/,connector.safetensors,split.json,log.jsonl,golden/,predictions.jsonl,curves.png,
        gates.json,status.json}; adapter/ is in PEFT's format
done    when every gate passes; exits 1 when one does not

$ python train_a2.py configs/a2_small.py
$ torchrun --standalone --nproc_per_node=8 train_a2.py configs/a2_qwen3_8b.py
$ python train_a2.py configs/a2_small.py --resume=True
"""
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm

import gates
from common import (Log, StopSignal, all_gather, all_sum, check_resumable, epoch_samples_for, frozen_dtype,
                    has_checkpoint, init_ranks, load_checkpoint, lock_run, peak_memory_mb, provenance, reduce_gradients,
                    save_checkpoint, seed_everything, sha256_file, sha256_tensors, tensorboard_writer, write_atomic)
from configure import configure
from data import (Ledger, Loader, Template, answer_starts, contact_sheet, image_reader, length_buckets, read_image,
                  read_llava, read_texts, split_rows)
from model import cache_features, complete_rows, image_ablation, image_settings, load_tokenizer, load_vlm

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# what goes in and out
data_json = ''                 # LLaVA-Instruct JSON: [{id, image, conversations}]
image_root = ''                # image paths in it are relative to this folder and stay inside it
align_dir = ''                 # out dir of the A1 run to start from: its connector, its base models, its shapes
text_jsonl = ''                # held-out plain text, {"text": ...} a line: what must not get worse
replay_jsonl = ''              # plain text to train on beside the chats, so that text stays what it was; '' for none
replay_share = 0.2             # of the rows, when there is a replay_jsonl
out_dir = 'out/a2'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
max_bad_samples = 0            # more unusable samples than this end the run; up to it they go to bad_samples.jsonl
allow_failed_gates = False     # start from an A1 run whose gates failed
# LoRA, on the language model only
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
lora_targets = r'model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)'   # full paths
# training
max_seq_len = 2048             # longer rows are cut at the end and counted
batch_size = 16                # rows per rank and micro-batch: memory and speed only, the result stays the same
rows_per_step = 128            # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 2e-5           # of the connector
lora_learning_rate = 2e-4
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
n_eval = 512                   # held-out items, balanced over short, medium and long answers
n_golden = 64                  # more held-out chats, answered at every checkpoint
n_predictions = 256            # eval chats answered at the end
n_text = 512                   # texts for the text-only regression
bucket_edges = (64, 128)       # a short chat has up to 64 label tokens, a medium one up to 128
max_new_tokens = 128
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.02               # the text-only loss may rise by this share over the base model's
gate_ablation_nats = 0.0       # the 95 % interval of every ablation's difference must clear this
# machine
device = 'auto'
dtype = 'auto'                 # of the frozen weights: bfloat16 on CUDA, float32 on CPU; what is trained is float32
feature_cache = ''             # folder for the tower's features, each image once; '' runs the tower every step
workers = 2                    # threads that decode images
log_every = 20
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('data_json', 'image_root', 'align_dir', 'text_jsonl'))
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

# derived values: the aligned model, then the data
gates.require_passed(align_dir, allow_failed_gates)
aligned, align_meta, _ = load_checkpoint(Path(align_dir) / 'ckpt', device)
model = align_meta['model']
num_image_tokens = model['shape']['num_image_tokens']
tokenizer = load_tokenizer(model['llm'])
template = Template(tokenizer, num_image_tokens, max_seq_len)
ledger = Ledger(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
rows = [template.chat(item) for item in read_llava(data_json, image_root, ledger)]
text_rows = [template.text(text, f'text {n}') for n, text in enumerate(read_texts(text_jsonl)[:n_text])]
prepare = image_settings(model['vision'])
read = partial(read_image, size=prepare['size'], resample=prepare['resample'])
split = partial(split_rows, rows, n_eval, n_golden, bucket_edges, out / 'split.json', ledger, read)
if rank == 0:
    split()                                            # writes the choice; the others read it
all_sum(0)
train_rows, eval_rows, golden_rows = split()
if replay_jsonl:
    replay = read_texts(replay_jsonl)
    n_replay = round(replay_share / (1 - replay_share) * len(train_rows))
    picks = np.random.default_rng(seed).integers(len(replay), size=n_replay)
    train_rows += [template.text(replay[k], f'replay {n}') for n, k in enumerate(picks)]

# model, and what is frozen
vlm = load_vlm(**model, dtype=dtype, device=device)
vlm.connector.load_state_dict(aligned['connector'])
frozen_sha = sha256_tensors((n, p) for n, p in vlm.named_parameters() if not p.requires_grad)
if frozen_sha != align_meta['frozen_sha256']:
    raise SystemExit(f'{align_dir} was aligned to other weights than those of {model["llm"]} and {model["vision"]} '
                     'today: restore them, or align again')
seed_everything(seed, 'lora')
try:
    adapter = get_peft_model(vlm.llm, LoraConfig(r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                                                 target_modules=lora_targets, task_type='CAUSAL_LM'))
except ValueError as e:
    raise SystemExit(f'lora_targets = {lora_targets!r}: {e}')
trainable = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
parts = {'connector': 'connector.', 'lora': 'llm.'}    # for the log: a gradient norm for each
cache = cache_features(feature_cache, vlm.tower, [r.item.image for r in rows if r.image_at >= 0], read, device
                       ) if feature_cache else None
get_image = image_reader(read, cache)
train, evaluation, golden, texts = (Loader(r, get_image, num_image_tokens, ledger, seed, workers)
                                    for r in (train_rows, eval_rows, golden_rows, text_rows))
if rank == 0:
    print(f'{len(train_rows)} rows to train on, {len(eval_rows)} to evaluate, {len(golden_rows)} golden; '
          f'connector and LoRA of {sum(p.numel() for p in trainable.values()):,} parameters')

# optimizer: a learning rate for the connector and one for LoRA; matrices decay, vectors do not
optimizer = torch.optim.AdamW(
    [{'params': [p for n, p in trainable.items() if n.startswith(prefix) and (p.ndim >= 2) == matrices],
      'weight_decay': weight_decay * matrices, 'peak': peak}
     for prefix, peak in (('connector.', learning_rate), ('llm.', lora_learning_rate)) for matrices in (True, False)],
    betas=(0.9, 0.98), fused=device.type == 'cuda')
optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]
step, first_step, with_gradient = 0, 0, set()
if resume:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_sha, used)
    vlm.connector.load_state_dict(tensors['connector'])
    set_peft_model_state_dict(adapter, tensors['lora'])
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


def lr_at(step):                                       # as a share of each group's peak
    warmup = max(1, round(warmup_frac * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))


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


def text_loss():
    """Mean loss in nats a label on plain text, without an image."""
    vlm.eval()
    mine = text_rows[rank::world_size]
    with torch.no_grad():
        nats = sum(vlm(texts.collate(mine[i:i + batch_size]).to(device)).item()
                   for i in range(0, len(mine), batch_size))
    vlm.train()
    return all_sum(nats) / sum(len(r.labelled) for r in text_rows)


def answer(load, path, n):
    """Answer every question of the first n chats, after the true answers before it; write one JSON line for each."""
    prompts = [(row, start, turn) for row in load.rows[:n] for turn, start in enumerate(answer_starts(row))]
    ids = complete_rows(vlm, load, [p[:2] for p in prompts], batch_size, max_new_tokens, [template.end],
                        rank, world_size)
    answers = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    if rank == 0:
        write_atomic(path, ''.join(json.dumps({
            'id': r.item.id, 'image': r.item.image, 'image_sha256': sha256_file(r.item.image), 'turn': turn,
            'question': r.item.turns[turn][0], 'truth': r.item.turns[turn][1], 'prediction': text}) + '\n'
            for (r, _, turn), text in zip(prompts, answers)))
    return [f'{r.item.turns[turn][0]} - {text}' for (r, _, turn), text in zip(prompts, answers) if turn == 0]


# the loop
log = Log(out / 'log.jsonl', step if resume else None, active=rank == 0, writer=writer)
if not resume:
    log.write('run', stage='a2', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
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
            means['text'] = text_loss()
            if step > first_step or not resume:        # a finished run that is judged again has this line already
                log.write('eval', step=step, **means)
            answers = answer(golden, out / 'golden' / f'step_{step:06d}.jsonl', n_golden)
            if rank == 0:
                bar.write(f'step {step}: held-out loss {means["correct"]:.4f} with the right image, '
                          f'{means["shuffled"]:.4f} another one, {means["zero"]:.4f} zeros, {means["noise"]:.4f} noise'
                          f'; text {means["text"]:.4f}')
                contact_sheet(out / 'golden' / f'step_{step:06d}.png', [r.item.image for r in golden_rows], answers)
        if rank == 0 and step > first_step:
            tensors = {'connector': vlm.connector.state_dict(), 'optimizer': optimizer.state_dict(),
                       'lora': get_peft_model_state_dict(adapter)}
            save_checkpoint(out / 'ckpt', tensors, {
                'stage': 'a2', 'model': model, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
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
                  'peak_memory_mb': peak_memory_mb(device)}
        log.write('step', **record)
        if rank == 0:
            bar.write(f'step {step}/{n_steps}: loss {nats / labels:.4f}, gradient {grad_norm:.3f}, lr x {lr:.3f}, '
                      f'{record["samples_per_s"]:.0f} samples/s, {record["data_wait"]:.0%} waiting for data')
        window, window_start, waited = [], time.time(), 0.0
bar.close()

# gates
answer(evaluation, out / 'predictions.jsonl', n_predictions)
text = text_loss()
with adapter.disable_adapter():
    base_text = text_loss()
status = 0
if rank == 0:
    frozen_now = sha256_tensors((n.replace('base_layer.', ''), p) for n, p in vlm.named_parameters()
                                if n not in trainable)
    declared = {n for n, _ in vlm.named_parameters() if n.startswith('connector.') or '.lora_' in n}
    verdicts = [gates.ablation(f'{c} image costs more than the right one', losses['correct'], losses[c], counts,
                               gate_ablation_nats)[0] for c in ('shuffled', 'zero', 'noise')]
    verdicts += [gates.at_most('text-only loss, rise over the base model', text / base_text - 1, gate_text),
                 gates.at_most('share of truncated samples', np.mean([r.truncated for r in rows]), gate_truncated),
                 gates.exactly('samples without a label', sum(len(r.labelled) == 0 for r in rows), 0),
                 gates.exactly("LoRA weights outside the language model's layers", sum(
                     'lora_' in n and not n.startswith('llm.model.layers.') for n, _ in vlm.named_parameters()), 0),
                 *gates.trained_set(declared, trainable, with_gradient, frozen_sha, frozen_now)]
    adapter.save_pretrained(out / 'adapter')
    save_file({n: p.contiguous() for n, p in vlm.connector.state_dict().items()}, out / 'connector.safetensors')
    gates.curves(out / 'log.jsonl', out / 'curves.png')
    status = gates.conclude(out, verdicts, losses=means, text_loss={'base': base_text, 'tuned': text})
    write_atomic(out / 'status.json', json.dumps({'state': 'finished', 'step': step, 'n_steps': n_steps}))
sys.exit(int(all_sum(status)))
