"""
Stage B4: multimodal token pretraining. The model learns to draw and to generate audio from a text, and goes on
describing what it sees and hears: LoRA on the language model, or its layers, learn beside the new rows.

reads   shards_dir from build_b2.py, a finished B3 out dir (rows, base model, token space), text_jsonl for the text-only
        regression and, if set, replay_jsonl to train on beside the tasks
writes  out_dir/{trainable_rows.pt,trainable_rows.json,token_space.json,adapter/,ckpt/,log.jsonl,golden/,predictions/,
        curves.png,gates.json,status.json}; adapter/ is in PEFT's format, with full_tune it is export/, a whole model
done    when every gate passes; exits 1 when one does not

$ python train_b4.py configs/b4_small.py
$ torchrun --standalone --nproc_per_node=8 train_b4.py configs/b4_qwen3_8b.py
$ python train_b4.py configs/b4_small.py --resume=True
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import gates
from common import (
    Progress, all_sum, barrier, frozen_dtype, init_ranks, load_checkpoint, on_rank_0, provenance, reduce_gradients,
    seed_everything, shutdown_ranks)
from configure import configure
from data import Loader, files_fingerprint, plain_texts
from grounding import crossed_share, distinct, matching_sets, retrieval, shared_phrases
from decoders import checkpoint_layers, load_tokenizer, lora, tuned_parts
from sharding import join_shards, places_of, save_with_shards, shard_layers, step_together
from shards import (
    MixtureSampler, label_counts, load_space, passes_line, require_enough, shards_fingerprint, task_shares,
    text_examples, token_sets, with_prompt)
from token_model import (
    complete_task, crossed_losses, example_sums, export_stock, load_new_rows, load_token_model, matching_keys,
    random_media, predictions_of, save_new_rows, shuffled_media, shuffled_prompts, write_completions)
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
new_rows_dir = ''              # out dir of the B3 run to start from: its rows, its base model, its typed_head
image_codec = ''               # the codecs the shards were made with, to decode what is generated
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''
audio_prefix = ''
text_jsonl = ''                # held-out plain text, {"text": ...} a line: what must not get worse
replay_jsonl = ''              # plain text to train on beside the tasks: text ability must not decay; '' for none
replay_share = 0.2             # of the examples, when there is a replay_jsonl
out_dir = 'out/b4'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
allow_failed_gates = False     # True: take shards or a B3 run that failed; train where a gate will, by data or settings
# what learns beside the new rows: LoRA on the language model only, or its layers
full_tune = False              # True: no LoRA, the layers and the last norm learn; text rows and head stay frozen
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05            # above 0 its masks depend on micro_batch_size and the number of ranks
lora_targets = ''              # a regular expression over full names; '' for every matrix in the decoder's layers
# mixture of tasks
task_weights = {'i2t': 1.0, 'a2t': 1.0, 't2i': 2.0, 't2a': 2.0}   # shares of the examples; an image weighs many labels
task_weights_start = {}        # the shares go from these to task_weights, in a straight line; {} for no ramp ...
ramp_frac = 0.2                # ... over this part of all steps
prompt_dropout = 0.1           # share of writing examples without their prompt: what guidance above 1 needs
# training
max_seq_len = 2048             # longer examples lose the end of their text, never codes, and are counted
micro_batch_size = 16          # examples per rank and micro-batch: memory and speed only, but for the masks of dropout
global_batch_size = 256        # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 1e-4           # of the new rows
lora_learning_rate = 2e-4      # of LoRA, or of the layers with full_tune
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
n_eval = 512                   # held-out items of each task
n_golden = 64                  # more of them, described, drawn and generated as audio at every checkpoint
n_golden_between = 16          # of these, at all checkpoints but the last: generation is most of an evaluation
n_predictions = 256            # eval items of each task described, drawn and generated as audio at the end
n_retrieval = 128              # eval items told apart by their loss at the end, 32 at a time; 32 at every checkpoint
n_text = 512                   # texts for the text-only regression
max_new_tokens = 64            # of a description
temperature = 1.0              # of generated images and audio
guidance = (1.0,)              # above 1 the prompt counts more; final predictions use each, all else the first
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.01               # the text-only loss may rise by this share over the base model's
gate_shuffled_nats = 0.10      # another item's media must cost this much per label, its 95 % interval above it ...
gate_shuffled_win = 0.80       # ... and cost more than the right one in this share of the items
gate_random_nats = 0.15        # the same for random codes
gate_random_win = 0.85
# how often the right input of an output, and the right output of an input, is found among 32 by its loss
gate_input_recall = 0.4        # recall@1, its 95 % interval above the bar; a guess has 0.03
gate_output_recall = 0.25
gate_prompt_nats = 0.05        # the same for another item's prompt, in the tasks that write
gate_prompt_win = 0.80
gate_empty_nats = 0.10         # the same for no prompt
gate_empty_win = 0.80
gate_items = 256               # held-out items that each of these is measured on, at least
gate_read_points = 2.0         # read tasks: percentage points of labels with p > 0.5 that may be lost since B3
gate_distinct = 0.5            # share of different outputs among the predictions; of texts, as a part of the truths'
gate_commonest = 0.1           # the commonest text's share may exceed that of the truths by this ...
gate_malformed = 0.1           # ... and the shares of stammering, empty and cut ones by this
gate_own_truth = 0.05          # how much nearer descriptions are to their own truth than to others, as F1 of words
gate_pixel_std = 10.0          # of a picture's pixels, of 255
gate_rms = 0.01                # of a sound's samples, of 1
gate_spectral_std = 6.0        # of a sound's spectrum, in dB; noise has about 5
# machine
device = 'auto'
dtype = 'auto'                 # of frozen weights: bfloat16 where the device multiplies it; what learns is float32
shard = False                  # True: in training each rank holds a part of the layers' weights; whole in evaluations
gradient_checkpointing = False  # True: layers are computed again on the way back: less memory, up to half more time
deterministic = False          # True: the same bits on a GPU each time, which is slower; a CPU's always are
log_every = 20
timeout = 30.0                 # minutes that a rank waits for another one after the first step; before it, a day
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('shards_dir', 'new_rows_dir', 'text_jsonl'))
# -----------------------------------------------------------------------------

# settings that cannot be meant end the run before anything is built
require_positive(config, 'max_seq_len', 'micro_batch_size', 'global_batch_size', 'learning_rate', 'grad_clip',
                 'epochs', 'epoch_minutes', 'eval_time_share', 'save_minutes', 'n_eval', 'n_golden', 'n_golden_between',
                 'max_new_tokens', 'log_every', 'n_text', 'n_retrieval', 'n_predictions', 'lora_r', 'lora_alpha',
                 'lora_learning_rate', 'timeout')
require_not_negative(config, 'epoch_samples', 'n_steps', 'eval_every', 'seed', 'weight_decay', 'temperature')
require_numbers(config, 'task_weights', 'task_weights_start', 'guidance')
require_share(config, 'warmup_frac', 'min_lr_frac', 'eval_time_share', 'gate_truncated', 'lora_dropout', 'replay_share',
              'prompt_dropout', 'ramp_frac')
if not 0 <= prompt_dropout < 1 or not 0 <= replay_share < 1 or not guidance:
    raise SystemExit(f'prompt_dropout = {prompt_dropout}, replay_share = {replay_share}, guidance = {guidance}: '
                     'wanted shares from 0 to below 1 and at least one guidance')

# ranks and the run's folder
rank, world_size, device = init_ranks(device, deterministic)
dtype = frozen_dtype(dtype, device)
out, is_resumed = open_run(out_dir, resume, rank)
stop = StopSignal(save_minutes, is_resumed=is_resumed)
board = tensorboard_writer(tensorboard)

# the B3 run, then the data: the items of the shards become examples of each task
gates.require_passed(shards_dir, allow_failed_gates)
gates.require_passed(new_rows_dir, allow_failed_gates)
_, b3_meta, _ = load_checkpoint(Path(new_rows_dir) / 'ckpt', 'cpu')
model_args = b3_meta['model']
llm = model_args['llm']
tokenizer = load_tokenizer(llm)
space = load_space(shards_dir, tokenizer, llm)
grammar = Grammar(space)
shares_end = task_shares(task_weights, grammar)
shares_start = task_shares(task_weights_start, grammar) if task_weights_start else shares_end
tasks = list({**shares_start, **shares_end})
train_sets = token_sets(shards_dir, 'train', tasks, grammar=grammar, max_seq_len=max_seq_len)
eval_sets = token_sets(shards_dir, 'eval', tasks, grammar=grammar, max_seq_len=max_seq_len, n=n_eval)
golden_sets = token_sets(shards_dir, 'golden', tasks, grammar=grammar, max_seq_len=max_seq_len, n=n_golden)
require_enough(train_sets, eval_sets, golden_sets, shards_dir, n_eval=gate_items, n_golden=n_golden)
matching = {}                  # {task: sets of eval items to tell apart}
for task, examples in eval_sets.items():
    matching[task] = matching_sets(matching_keys(task, examples), n_retrieval, seed)
text_set = text_examples(text_jsonl, tokenizer, max_seq_len, n_text)
label_gates = gates.label_gates(*label_counts(train_sets, eval_sets, golden_sets), gate_truncated)   # of the tasks
gates.end_doomed(label_gates, allow_failed_gates)
if replay_jsonl:
    train_sets['text'] = text_examples(replay_jsonl, tokenizer, max_seq_len)
    n_cut = sum(example.truncated for example in train_sets['text'])
    if rank == 0 and n_cut:                            # no fault: what is left of them is text as well
        print(f'{n_cut} of {len(train_sets["text"])} texts to replay are cut at max_seq_len = {max_seq_len}')
data_seen = on_rank_0(shards_fingerprint, shards_dir)   # a resume has to see the same
data_seen |= on_rank_0(files_fingerprint, text_jsonl=text_jsonl, replay_jsonl=replay_jsonl)


def shares_at(done):
    """{task: share of the examples} at a point of the training from 0 to 1: a straight line from shares_start to
    shares_end over the ramp; replayed text has the same share all along."""
    ramp = min(1.0, done / ramp_frac) if ramp_frac else 1.0
    text_share = replay_share if replay_jsonl else 0.0
    shares = {'text': text_share}
    for task in tasks:
        share = (1 - ramp) * shares_start.get(task, 0.0) + ramp * shares_end.get(task, 0.0)
        shares[task] = share * (1 - text_share)
    return shares


def mixture(n_steps):
    return MixtureSampler(train_sets, shares_at, n_steps, global_batch_size=global_batch_size, seed=seed,
                          prompt_dropout=prompt_dropout)


# model: the language model starts frozen, with the rows of B3; then LoRA joins it, or its layers begin to learn
seed_everything(seed, 'lora')
model = load_token_model(**model_args, space=space, dtype=dtype, device='cpu' if shard else device)
base_sha256 = frozen_sha256(model, {'new_in', 'new_out'})
if load_new_rows(model, new_rows_dir)['base_sha256'] != base_sha256:
    raise SystemExit(f'{new_rows_dir} was made on other weights than those of {llm} today, or in another dtype: '
                     'restore them, set dtype, or run B3 again')
if full_tune:
    for part in tuned_parts(model.llm).values():
        part.float().requires_grad_(True)              # in float32: these weights are their own masters
else:
    adapter = lora(model.llm, lora_r, lora_alpha, dropout=lora_dropout, targets=lora_targets)
if gradient_checkpointing:
    checkpoint_layers(model.llm)
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
names = [name for name, _ in model.named_parameters()]
tuned = [f'llm.{name}.' for name in tuned_parts(model.llm)] if full_tune else []
declared = {name for name in names if name.startswith(('new_', *tuned)) or '.lora_' in name}
gates.end_doomed([gates.lora_gate(names), gates.declared_gate(declared, trainable)], allow_failed_gates)
# beside LoRA the same weights are frozen as before it: they are hashed once
frozen_before = frozen_sha256(model, trainable) if full_tune else base_sha256
if shard:                                              # after the hash: from here on each rank has a part
    shard_layers(model.llm, device)
    model.to(device)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
norm_groups = {'rows': 'new_', 'lora': 'llm.'}         # the log has a gradient norm for each


def tuned_state():
    """What has been learned beside the new rows, {name: tensor}."""
    if not full_tune:
        return get_peft_model_state_dict(adapter)
    return {name: p.detach() for name, p in trainable.items() if name.startswith('llm.')}


def load_tuned_state(state):
    if not full_tune:
        set_peft_model_state_dict(adapter, state)
        return
    with torch.no_grad():
        for name, p in state.items():
            trainable[name].copy_(p)


loader = Loader()
codecs = None
if rank == 0:
    codecs = UTI.of_space(space, shards_dir, llm, image_codec=image_codec, audio_codec=audio_codec,
                          image_prefix=image_prefix, audio_prefix=audio_prefix, device=device)
barrier()
if rank == 0:
    n_train = sum(len(examples) for examples in train_sets.values())
    held_out = ', '.join(f'{len(examples)} {task}' for task, examples in eval_sets.items())
    print(f'{n_train} examples of {len(tasks)} tasks to train on; {held_out} of {n_eval} to evaluate; '
          f'{sum(p.numel() for p in trainable.values()):,} parameters learn')

# optimizer: matrices decay, vectors do not; peak: a group's highest learning rate
peaks = {'new_': learning_rate, 'llm.': lora_learning_rate}
groups = parameter_groups(trainable, peaks, weight_decay)
# 0.98: the mean square of a gradient is over some 50 steps; over 1,000, as by 0.999, it would lag in so short a run
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
step = first_step = 0
evaluated = False              # whether the log has the evaluation of this step already
with_gradient = set()          # names of what has had a gradient so far: everything trainable has to get there
at_start = {}                  # the first evaluation's means: of the B3 run, since LoRA begins as nothing
if is_resumed:
    tensors, meta, used = load_checkpoint(out / 'ckpt', 'cpu' if shard else device)
    check_resumable(meta, config, frozen_before, used)
    space.require(TokenSpace.of_fields(meta['token_space']), used)
    check_same_data(meta, data_seen, used)
    if full_tune:                                      # of which a part is in shards, here or where it was saved
        tensors = join_shards(tensors, used, places_of(tuned_state(), optimizer))
    model.load_new_rows_state(tensors['new_rows'], used)
    optimizer.load_state_dict(tensors['optimizer'])
    load_tuned_state(tensors['tuned'])
    step = first_step = meta['step']
    epoch_samples = meta['epoch_samples']
    eval_every = meta['eval_every']
    with_gradient = set(meta['with_gradient'])
    evaluated = meta['evaluated']
    at_start = meta['start']


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
        return {
            'shuffled': shuffled_prompts(examples, seed),
            'empty': [with_prompt(example, ()) for example in examples],
        }
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
        golden[task] = generate(task, examples, out / 'golden' / f'step_{step:06d}' / task, guidance[0])
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
    nats, _ = example_sums(model, text_set, micro_batch_size, rank=rank, world_size=world_size)
    means['text'] = float(nats.sum() / sum(len(example.label_positions) for example in text_set))
    stop_if_eval_not_finite(step, means, out)
    return losses, counts, crossed, means, rates, generate_golden(at_end)


def save(state):
    """out/ckpt and status.json. On every rank."""
    if step > first_step:
        tensors = {'new_rows': model.new_rows_state(), 'tuned': tuned_state(), 'optimizer': optimizer.state_dict()}
        save_with_shards(out / 'ckpt', tensors, {
            'stage': 'b4', 'model': model_args, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
            'eval_every': eval_every,
            'settings': config, 'frozen_sha256': frozen_before, 'with_gradient': sorted(with_gradient),
            'evaluated': evaluated, 'data': data_seen, 'token_space': space.fields(), 'start': at_start})
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
eval_first = True              # no setting here: two gates compare with it
log = Log(out / 'log.jsonl', step if is_resumed else None, evaluated, active=rank == 0, writer=board)
if not is_resumed:
    log.write('run', stage='b4', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
              eval_every=eval_every, trainable=sum(p.numel() for p in trainable.values()), token_space=space.sha256,
              held_out={task: len(examples) for task, examples in eval_sets.items()}, **provenance())
model.train()
meter = Meter()
stop.save = save
progress = Progress(n_steps, 'b4', initial=step, active=rank == 0)
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
            at_start = at_start or {**means, **rates}
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
        task_mix = {f'share_{task}': share for task, share in shares_at((step - 1) / n_steps).items()}
        log.write('step', step=step, loss=loss, lr=lr * learning_rate, lr_lora=lr * lora_learning_rate,
                  grad_norm=grad_norm, **norms, **window, **task_mix)
        progress.write(f'step {step}/{n_steps}: loss {window["window_loss"]:.4f}, gradient {grad_norm:.3f}, '
                       f'learning rate {lr:.1%} of its peak, {window["samples_per_s"]:.0f} samples/s, '
                       f'{window["data_wait"]:.0%} waiting for data')
progress.close()

# gates
predicted = {}
for task, examples in eval_sets.items():
    values = guidance if TASKS[task][1] == 'write' else guidance[:1]
    for value in values:
        name = task if value == guidance[0] else f'{task}_guidance_{value:g}'
        predicted[name] = generate(task, examples[:n_predictions], out / 'predictions' / name, value)
model.eval()                                           # on every rank: rank 0 judges and exports alone
status = 0
if rank == 0:
    shared = 0.0
    if replay_jsonl:
        replayed = plain_texts(train_sets['text'][:20_000])       # as many as take a second
        shared = shared_phrases(plain_texts(text_set), replayed)
    verdicts = [gates.text_gate(means['text'] / at_start['text'] - 1, gate_text, shared)]
    read_bars = {
        'shuffled': ("another item's media cost more than the right ones", gate_shuffled_nats, gate_shuffled_win),
        'random': ('random codes cost more than the right ones', gate_random_nats, gate_random_win),
    }
    write_bars = {
        'shuffled': ("another item's prompt costs more than the right one", gate_prompt_nats, gate_prompt_win),
        'empty': ('no prompt costs more than the right one', gate_empty_nats, gate_empty_win),
    }
    measured = {}
    worth = {}
    for task in tasks:
        modality, direction = TASKS[task]
        golden_outputs, golden_decoded = golden[task]
        outputs, decoded = predicted[task]
        worth[task] = gates.worth(rates[f'{task}_share_removed'], crossed[task], distinct(outputs))
        names = {'read': ('media of a text', 'text of its media'), 'write': ('prompt of codes', 'codes of a prompt')}
        input_name, output_name = names[direction]
        verdicts += gates.retrieval_gates(crossed[task], f'{task}: {input_name}', f'{task}: {output_name}',
                                          input_bar=gate_input_recall, output_bar=gate_output_recall)
        bars = read_bars if direction == 'read' else write_bars
        for condition, (name, nats, win) in bars.items():
            gate, measured[f'{task}_{condition}'] = gates.ablation(
                f'{task}: {name}', losses[task]['correct'], losses[task][condition], counts=counts[task], bar=nats,
                min_win=win)
            verdicts.append(gate)
        if direction == 'read':
            lost = 100 * (at_start[f'{task}_right'] - rates[f'{task}_right'])
            verdicts.append(gates.at_most(f'{task}: points of right labels lost since B3', lost, gate_read_points))
            described = [*golden_sets[task], *eval_sets[task][:n_predictions]]
            predictions = predictions_of(described, [*golden_outputs, *outputs], tokenizer, max_new_tokens)
            verdicts += gates.text_gates(f'{task}: descriptions', predictions, distinct=gate_distinct,
                                         commonest=gate_commonest, malformed=gate_malformed, own_truth=gate_own_truth)
            continue
        if modality == 'image':
            shapes = [(3, space.image['size'], space.image['size'])] * len(golden_sets[task])
            collapse_bars = {'pixel_std': gate_pixel_std}
        else:
            shapes = [(example.item.meta['n_samples'],) for example in golden_sets[task]]
            collapse_bars = {'rms': gate_rms, 'spectral_std': gate_spectral_std}
        first, end = grammar.bounds(grammar.payload_ranges[modality])
        verdicts.append(gates.at_least(f'{task}: held-out items', len(eval_sets[task]), gate_items))
        verdicts += gates.generation_gates(task, [*golden_outputs, *outputs], first, end=end, golden=golden_decoded,
                                           shapes=shapes, n_golden=n_golden)
        verdicts += gates.collapse_gates(task, outputs, decoded, distinct=gate_distinct, **collapse_bars)
    verdicts += label_gates
    verdicts.append(gates.lora_gate(names))
    verdicts += gates.training_gates(declared, trainable, with_gradient, before=frozen_before,
                                     after=frozen_sha256(model, trainable))
    status = gates.conclude(out, verdicts, worth=worth, losses=means, start=at_start, ablations=measured)
    # after the verdict, which a disk that is full of weights would cost
    save_new_rows(model, out, stage='b4', step=step, base_sha256=base_sha256)
    if full_tune:
        export_stock(model, tokenizer, out / 'export')
    else:
        adapter.save_pretrained(out / 'adapter')
    write_status(out, 'finished', step, n_steps)
    gates.curves(out / 'log.jsonl', out / 'curves.png', [f'{task}_correct' for task in tasks], tasks)
barrier()                                              # an export may take longer than a rank waits in a step
status = int(all_sum(status))
shutdown_ranks()
sys.exit(status)
