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
import math
import sys

import numpy as np
import torch

import gates
from common import (
    Progress, all_sum, barrier, frozen_dtype, init_ranks, load_checkpoint, on_rank_0, provenance, reduce_gradients,
    save_checkpoint, seed_everything, shutdown_ranks)
from configure import configure
from data import Loader, files_fingerprint
from grounding import crossed_share, distinct, matching_sets, retrieval
from decoders import checkpoint_layers, load_tokenizer
from sharding import shard_layers, step_together
from shards import (
    MixtureSampler, label_counts, load_space, passes_line, require_enough, shards_fingerprint, task_shares,
    text_examples, token_sets)
from token_model import (
    complete_task, crossed_losses, example_sums, export_difference, export_stock, load_token_model, matching_keys,
    random_media, predictions_of, save_new_rows, shuffled_media, text_difference, training_bytes, write_completions)
from training import (
    N_MEASURED, N_WARMUP, Log, Meter, StopSignal, check_resumable, check_same_data, clip_gradients, frozen_sha256,
    grad_norms, measure_epoch, names_with_gradient, open_run, parameter_groups, require_not_negative, require_numbers,
    require_positive, require_share, stop_if_eval_not_finite, stop_if_not_finite, tensorboard_writer, write_status)
from uti import TASKS, UTI, Grammar, TokenSpace
from watch import wait_at_most

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# inputs and outputs
shards_dir = ''                # train, eval and golden items, with the token space that they were made for
llm = ''                       # Hugging Face folder or name of the language model of that token space, kept frozen
image_codec = ''               # the codecs the shards were made with, to decode what is generated; '' saves codes only
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''
audio_prefix = ''
text_jsonl = ''                # lines of {"text": ...}: their probabilities have to stay as they are
out_dir = 'out/b3'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
allow_failed_gates = False     # True: take shards whose gates failed; train where one will fail by data or settings
# new rows
typed_head = True              # a label's loss over its own range; False: over every id, for other engines
new_rows_noise = 0.02          # new rows start at the mean text row plus noise of this deviation
task_weights = {'i2t': 1.0, 'a2t': 1.0, 't2i': 1.0, 't2a': 1.0}   # shares of the examples; an image weighs many labels
# training
max_seq_len = 2048             # longer examples lose the end of their text, never codes, and are counted
micro_batch_size = 16          # examples per rank and micro-batch: memory and speed only, the result stays the same
global_batch_size = 256        # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 1e-3
warmup_frac = 0.03             # of all steps
min_lr_frac = 0.1              # the cosine ends at min_lr_frac * learning_rate
weight_decay = 0.0
grad_clip = 1.0
epochs = 1.0
epoch_minutes = 60.0           # an epoch is as many samples as this time allows, measured on this machine ...
epoch_samples = 0              # ... or exactly this many, when not 0
n_steps = 0                    # when not 0, a run is exactly this many steps, whatever epochs say
seed = 1
# evaluation
eval_every = 0                 # steps; every evaluation saves a checkpoint; 0 for as often as eval_time_share allows,
eval_time_share = 0.05         # ... of the time, measured at the first start
save_minutes = 20.0            # a checkpoint comes after so long where no evaluation has saved one
eval_first = True              # False: none before the first step, where nothing has been learned
n_eval = 512                   # held-out items of each task
n_golden = 64                  # more of them, described, drawn and generated as audio at every checkpoint
n_golden_between = 16          # of these, at all checkpoints but the last: generation is most of an evaluation
n_retrieval = 128              # eval items told apart by their loss at the end, 32 at a time; 32 at every checkpoint
n_text = 64                    # texts that the base model and this one are compared on
max_new_tokens = 64            # of a description
temperature = 1.0              # of generated images and audio
guidance = 1.0                 # above 1 the prompt counts more; training has no prompt dropout yet, so 1 here
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.0                # largest difference of a text log probability; with typed_head it is exactly 0
gate_shuffled_nats = 0.10      # another item's media must cost this much per label, its 95 % interval above it ...
gate_shuffled_win = 0.80       # ... and cost more than the right one in this share of the items
gate_random_nats = 0.15        # the same for random codes
gate_random_win = 0.85
# how often the right input of an output, and the right output of an input, is found among 32 by its loss
gate_input_recall = 0.1        # recall@1, its 95 % interval above the bar; a guess has 0.03
gate_output_recall = 0.1
gate_distinct = 0.5            # different ones among the descriptions, as a part of the truths' own share
gate_commonest = 0.1           # the commonest one's share may exceed that of the truths by this ...
gate_malformed = 0.95          # ... and those of stammering, empty and cut ones: rows alone do not learn to end a text
# machine
device = 'auto'
dtype = 'auto'                 # of frozen weights: bfloat16 where the device multiplies it; what learns is float32
shard = False                  # True: in training each rank holds a part of the layers' weights; whole in evaluations
gradient_checkpointing = False  # True: layers are computed again on the way back: less memory, up to half more time
deterministic = False          # True: the same bits on a GPU each time, which is slower; a CPU's always are
log_every = 20
timeout = 30.0                 # minutes that a rank waits for another one after the first step; before it, a day
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('shards_dir', 'llm', 'text_jsonl'))
# -----------------------------------------------------------------------------

# settings that cannot be meant end the run before anything is built
require_positive(config, 'max_seq_len', 'micro_batch_size', 'global_batch_size', 'learning_rate', 'grad_clip',
                 'epochs', 'epoch_minutes', 'eval_time_share', 'save_minutes', 'n_eval', 'n_golden', 'n_golden_between',
                 'max_new_tokens', 'log_every', 'n_text', 'n_retrieval', 'timeout')
require_not_negative(config, 'epoch_samples', 'n_steps', 'eval_every', 'seed', 'weight_decay', 'new_rows_noise',
                     'temperature', 'guidance')
require_numbers(config, 'task_weights')
require_share(config, 'warmup_frac', 'min_lr_frac', 'eval_time_share', 'gate_truncated')

# ranks and the run's folder
rank, world_size, device = init_ranks(device, deterministic)
dtype = frozen_dtype(dtype, device)
out, is_resumed = open_run(out_dir, resume, rank)
stop = StopSignal(save_minutes, is_resumed=is_resumed)
board = tensorboard_writer(tensorboard)

# data: the items of the shards become examples of each task
gates.require_passed(shards_dir, allow_failed_gates)
tokenizer = load_tokenizer(llm)
space = load_space(shards_dir, tokenizer, llm)
grammar = Grammar(space)
shares = task_shares(task_weights, grammar)
tasks = list(shares)
train_sets = token_sets(shards_dir, 'train', tasks, grammar=grammar, max_seq_len=max_seq_len)
eval_sets = token_sets(shards_dir, 'eval', tasks, grammar=grammar, max_seq_len=max_seq_len, n=n_eval)
golden_sets = token_sets(shards_dir, 'golden', tasks, grammar=grammar, max_seq_len=max_seq_len, n=n_golden)
require_enough(train_sets, eval_sets, golden_sets, shards_dir)
matching = {}                  # {task: sets of eval items to tell apart}
for task, examples in eval_sets.items():
    matching[task] = matching_sets(matching_keys(task, examples), n_retrieval, seed)
text_set = text_examples(text_jsonl, tokenizer, max_seq_len, n_text)
label_gates = gates.label_gates(*label_counts(train_sets, eval_sets, golden_sets), gate_truncated)
gates.end_doomed(label_gates, allow_failed_gates)
data_seen = on_rank_0(shards_fingerprint, shards_dir)   # a resume has to see the same
data_seen |= on_rank_0(files_fingerprint, text_jsonl=text_jsonl)


def shares_at(done):
    """{task: share of the examples} at a point of the training from 0 to 1: always the same."""
    return shares


def mixture(n_steps):
    return MixtureSampler(train_sets, shares_at, n_steps, global_batch_size=global_batch_size, seed=seed)


# model: the language model is frozen, the new rows learn
seed_everything(seed, 'rows')
model_args = {'llm': llm, 'typed_head': typed_head}
model = load_token_model(**model_args, space=space, noise=new_rows_noise, dtype=dtype,
                         device='cpu' if shard else device)
if gradient_checkpointing:
    checkpoint_layers(model.llm)
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
frozen_before = frozen_sha256(model, trainable)
if shard:                                              # after the hash: from here on each rank has a part
    shard_layers(model.llm, device)
    model.to(device)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
norm_groups = {'new_in': 'new_in', 'new_out': 'new_out'}   # the log has a gradient norm for each
# which rows have had a gradient so far, for the deliverable
touched = {name: torch.zeros(len(p), dtype=torch.bool, device=device) for name, p in trainable.items()}
loader = Loader()
codecs = None
if rank == 0 and (image_codec or audio_codec):
    codecs = UTI.of_space(space, shards_dir, llm, image_codec=image_codec, audio_codec=audio_codec,
                          image_prefix=image_prefix, audio_prefix=audio_prefix, device=device)
barrier()
if rank == 0:
    n_train = sum(len(examples) for examples in train_sets.values())
    held_out = ', '.join(f'{len(examples)} {task}' for task, examples in eval_sets.items())
    print(f'{n_train} examples of {len(tasks)} tasks to train on; {held_out} of {n_eval} to evaluate; '
          f'{sum(p.numel() for p in trainable.values()):,} parameters learn')

# optimizer: its state is for the new rows alone
peaks = {'new_': learning_rate}
groups = parameter_groups(trainable, peaks, weight_decay)
# 0.98: the mean square of a gradient is over some 50 steps; over 1,000, as by 0.999, it would lag in so short a run
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
step = first_step = 0
evaluated = False              # whether the log has the evaluation of this step already
with_gradient = set()          # names of what has had a gradient so far: everything trainable has to get there
if is_resumed:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_before, used)
    space.require(TokenSpace.of_fields(meta['token_space']), used)
    check_same_data(meta, data_seen, used)
    model.load_new_rows_state(tensors['new_rows'], used)
    optimizer.load_state_dict(tensors['optimizer'])
    touched = tensors['touched']
    step = first_step = meta['step']
    epoch_samples = meta['epoch_samples']
    eval_every = meta['eval_every']
    with_gradient = set(meta['with_gradient'])
    evaluated = meta['evaluated']


def forward_backward(batches):
    """Gradients of the whole step's loss, sum over its labels / their count over all ranks; returns the loss."""
    n_labels = all_sum(sum(batch.n_labels for batch in batches))
    loss = torch.zeros((), device=device, dtype=torch.float64)
    for batch in step_together(model.llm, batches):
        loss_sum = model(batch.to(device))
        (loss_sum / max(n_labels, 1)).backward()
        loss += loss_sum.detach()
    reduce_gradients(trainable.values())               # a sum: the division above was by the labels of all ranks
    return all_sum(loss) / max(n_labels, 1), n_labels


def lr_at(step):
    """The learning rate as a share of each group's peak."""
    warmup = max(1, round(warmup_frac * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))


def ablations(task, examples):
    """{condition: the held-out examples of a task with something else in the place of what they are about}."""
    modality, direction = TASKS[task]
    if direction == 'write':
        return {}
    return {
        'shuffled': shuffled_media(examples, grammar.length(modality), seed),
        'random': random_media(examples, grammar, modality, seed),
    }


def generate(task, examples, path, guidance):
    """Describe, draw or generate audio: path.jsonl, a line an example, and what it decodes to in path/. Returns what
    was generated and, on rank 0, what it decodes to."""
    # nothing is kept for a backward pass: four times as many fit
    outputs = complete_task(model, grammar, task=task, examples=examples, batch_size=4 * micro_batch_size,
                            max_new_tokens=max_new_tokens, temperature=temperature, guidance=guidance, rank=rank,
                            world_size=world_size)
    decoded = []
    if rank == 0:
        decoded = write_completions(path, task, examples, outputs=outputs, tokenizer=tokenizer, uti=codecs,
                                    batch_size=micro_batch_size)
    barrier()                                          # the others do nothing meanwhile
    return outputs, decoded


def generate_golden(at_end):
    """{task: what is generated of its golden items and what it decodes to}; at_end of all of them."""
    golden = {}
    for task, examples in golden_sets.items():
        examples = examples if at_end else examples[:n_golden_between]
        golden[task] = generate(task, examples, out / 'golden' / f'step_{step:06d}' / task, guidance)
    return golden


def evaluate(at_end):
    """Look at the held-out and the golden items, at the end at all of them, on every rank.

    Returns, each a dict: of each task {condition: summed loss of each held-out example}, their labels, crossed losses;
    for the log means in nats per label, and rates (of items in which the right one wins or is found, of labels that get
    more than half of the probability); what generate_golden returns.
    """
    losses = {}
    counts = {}
    crossed = {}
    means = {}
    rates = {}
    for task, examples in eval_sets.items():
        counts[task] = np.array([len(example.label_positions) for example in examples])
        correct, n_right = example_sums(model, examples, micro_batch_size, rank=rank, world_size=world_size)
        losses[task] = {'correct': correct}
        means[f'{task}_correct'] = float(correct.sum() / counts[task].sum())
        rates[f'{task}_right'] = float(n_right.sum() / counts[task].sum())
        for condition, others in ablations(task, examples).items():
            sums, _ = example_sums(model, others, micro_batch_size, rank=rank, world_size=world_size)
            losses[task][condition] = sums
            means[f'{task}_{condition}'] = float(sums.sum() / counts[task].sum())
            rates[f'{task}_win_{condition}'] = float((sums > correct).mean())
        sets = matching[task] if at_end else matching[task][:1]
        crossed[task] = crossed_losses(model, task, examples, sets, micro_batch_size, rank=rank,
                                       world_size=world_size)
        for name, rate in retrieval(crossed[task]).items():
            rates[f'{task}_{name}'] = rate
        rates[f'{task}_share_removed'] = crossed_share(crossed[task]).value
    stop_if_eval_not_finite(step, means, out)
    return losses, counts, crossed, means, rates, generate_golden(at_end)


def save(state):
    """out/ckpt and status.json. On every rank."""
    if rank == 0 and step > first_step:
        tensors = {'new_rows': model.new_rows_state(), 'touched': touched, 'optimizer': optimizer.state_dict()}
        save_checkpoint(out / 'ckpt', tensors, {
            'stage': 'b3', 'model': model_args, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
            'eval_every': eval_every,
            'settings': config, 'frozen_sha256': frozen_before, 'with_gradient': sorted(with_gradient),
            'evaluated': evaluated, 'data': data_seen, 'token_space': space.fields()})
    if rank == 0:
        write_status(out, state, step, n_steps)
    barrier()                                          # nobody leaves, and ends the run, while rank 0 still writes
    stop.saved(step)


# schedule: n_steps, or how many samples an epoch of epoch_minutes holds, with its evaluations, and when these are
if n_steps:
    epoch_samples = round(n_steps * global_batch_size / epochs)
if not epoch_samples or not eval_every:
    n_first = N_WARMUP + N_MEASURED
    first_steps = loader.steps(mixture(n_first), 0, n_first, micro_batch_size, rank, world_size)
    n_samples, eval_every = measure_epoch(first_steps, forward_backward, optimizer, epoch_minutes, global_batch_size,
                                          evaluate=evaluate, eval_every=eval_every,
                                          eval_time_share=eval_time_share)
    epoch_samples = epoch_samples or n_samples
n_steps = n_steps or max(1, round(epochs * epoch_samples / global_batch_size))
sampler = mixture(n_steps)
if rank == 0:
    print(f'an epoch goes through {passes_line(sampler, epochs)}')
    print(f'{n_steps} steps of {global_batch_size}; repeat exactly with --epoch_samples={epoch_samples} '
          f'--eval_every={eval_every}')

# the loop
log = Log(out / 'log.jsonl', step if is_resumed else None, evaluated, active=rank == 0, writer=board)
if not is_resumed:
    log.write('run', stage='b3', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
              eval_every=eval_every, trainable=sum(p.numel() for p in trainable.values()), token_space=space.sha256,
              held_out={task: len(examples) for task, examples in eval_sets.items()}, **provenance())
model.train()
meter = Meter()
stop.save = save
progress = Progress(n_steps, 'b3', initial=step, active=rank == 0)
batches_of_steps = loader.steps(sampler, step, n_steps, micro_batch_size, rank, world_size)
while True:
    # evaluate and save; the stop test below makes first and last evaluation ordinary ones
    stopped = stop.before_step()
    is_last = step == n_steps
    is_due = is_last or (step % eval_every == 0 and (eval_first or step > 0))
    if is_due or stopped or stop.save_is_due:
        meter.pause()
        if is_due and not stopped and (is_last or not evaluated):   # a finished run is judged again, and logged once
            losses, counts, crossed, means, rates, golden = evaluate(at_end=is_last)
            if not evaluated:
                log.write('eval', step=step, **means, **rates)
            evaluated = True
            parts = [f'{name.removesuffix("_correct")} {mean:.4f}' for name, mean in means.items()]
            progress.write(f'step {step}: held-out loss {", ".join(parts)}')
        save('stopped' if stopped else 'running')
        meter.go_on()
    if stopped:
        stop.leave()
    if is_last:
        break

    lr = lr_at(step)
    for group in optimizer.param_groups:
        group['lr'] = lr * group['peak']

    batches = meter.next_of(batches_of_steps)          # made while the step before was running
    seed_everything(seed, step, rank)                  # dropout is a function of the step: resume draws the same
    loss, n_labels = forward_backward(batches)

    norms = grad_norms(trainable, norm_groups)
    grad_norm = math.hypot(*norms.values())
    stop_if_not_finite(step, loss, grad_norm, batches=batches, out=out)   # before the update
    with_gradient |= names_with_gradient(trainable, with_gradient)
    for name, p in trainable.items():
        if p.grad is not None:
            touched[name] |= p.grad.any(1)
    clip_gradients(trainable, grad_norm, grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    evaluated = False
    wait_at_most(timeout)                              # longer until here, while data was prepared
    progress.update(loss=loss)

    meter.add(loss, n_labels, batches)
    if step % log_every == 0 or step == n_steps:
        window = meter.read(device)
        norms = {f'grad_norm_{group}': norm for group, norm in norms.items()}
        log.write('step', step=step, loss=loss, lr=lr * learning_rate, grad_norm=grad_norm, **norms, **window)
        progress.write(f'step {step}/{n_steps}: loss {window["window_loss"]:.4f}, gradient {grad_norm:.3f}, '
                       f'learning rate {lr:.1%} of its peak, {window["samples_per_s"]:.0f} samples/s, '
                       f'{window["data_wait"]:.0%} waiting for data')
progress.close()

# gates
text = text_difference(model, text_set, rank, world_size)
model.eval()                                           # on every rank: rank 0 judges and exports alone
status = 0
if rank == 0:
    verdicts = [gates.at_most('text log probabilities, largest difference from the base', text, gate_text)]
    bars = {
        'shuffled': ("another item's media cost more than the right ones", gate_shuffled_nats, gate_shuffled_win),
        'random': ('random codes cost more than the right ones', gate_random_nats, gate_random_win),
    }
    measured = {}
    worth = {}
    for task in tasks:
        outputs, _ = golden[task]
        worth[task] = gates.worth(rates[f'{task}_share_removed'], crossed[task], distinct(outputs))
        if TASKS[task][1] == 'write':                  # what drawing learned from rows alone is B4's start, not its end
            continue
        verdicts += gates.retrieval_gates(crossed[task], f'{task}: media of a text', f'{task}: text of its media',
                                          input_bar=gate_input_recall, output_bar=gate_output_recall)
        predictions = predictions_of(golden_sets[task], outputs, tokenizer, max_new_tokens)
        verdicts += gates.text_gates(f'{task}: descriptions', predictions, distinct=gate_distinct,
                                     commonest=gate_commonest, malformed=gate_malformed)
        for condition, (name, nats, win) in bars.items():
            gate, measured[f'{task}_{condition}'] = gates.ablation(
                f'{task}: {name}', losses[task]['correct'], losses[task][condition], counts=counts[task], bar=nats,
                min_win=win)
            verdicts.append(gate)
    verdicts += label_gates
    beyond = set(optimizer.state) - {model.new_in, model.new_out}
    verdicts.append(gates.exactly('optimizer state beyond the new rows', len(beyond), 0))
    verdicts += gates.training_gates({'new_in', 'new_out'}, trainable, with_gradient, before=frozen_before,
                                     after=frozen_sha256(model, trainable))
    # the verdict is written first, with a failed gate on the export, in case the disk fills up
    name = 'exported logits, largest difference in a stock load'
    record = {'worth': worth, 'losses': means, 'ablations': measured, 'bytes': training_bytes(model, optimizer)}
    gates.write_gates(out, [*verdicts, gates.exactly(name, math.nan, 0)], **record)
    save_new_rows(model, out, stage='b3', step=step, base_sha256=frozen_before,
                  rows_with_gradient={name: int(rows.sum()) for name, rows in touched.items()})
    export_stock(model, tokenizer, out / 'export')
    drift = export_difference(model, out / 'export', [examples[0] for examples in eval_sets.values()])
    status = gates.conclude(out, [*verdicts, gates.exactly(name, drift, 0)], **record)
    write_status(out, 'finished', step, n_steps)
    gates.curves(out / 'log.jsonl', out / 'curves.png', [f'{task}_correct' for task in tasks], tasks)
barrier()                                              # an export may take longer than a rank waits in a step
status = int(all_sum(status))
shutdown_ranks()
sys.exit(status)
