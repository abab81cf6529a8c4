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
import math
import sys
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

import gates
from common import (
    Progress, all_sum, barrier, frozen_dtype, init_ranks, load_checkpoint, on_rank_0, provenance, rank_parts,
    reduce_gradients, save_checkpoint, seed_everything, shutdown_ranks)
from configure import configure
from templates import ChatTemplate
from data import (
    Loader, ShuffledSampler, choose_split, data_fingerprint, files_fingerprint, image_reader, load_split,
    plain_texts)
from examples import Chosen, prepare
from grounding import distinct, matching_sets, share_removed, shared_phrases
from inference import ablation_means, caption_keys, crossed_losses, image_ablation, write_predictions
from lists import text_lines
from media import BadSamples, contact_sheet
from decoders import checkpoint_layers, load_tokenizer, lora
from model import cache_features, image_reading, image_settings, load_vlm
from sharding import shard_layers, step_together
from training import (
    N_MEASURED, N_WARMUP, Log, Meter, StopSignal, check_resumable, check_same_data, check_same_parts, clip_gradients,
    frozen_sha256, grad_norms, measure_epoch, names_with_gradient, open_run, parameter_groups, require_not_negative,
    require_positive, require_share, require_split, stop_if_eval_not_finite, stop_if_not_finite, tensorboard_writer,
    write_status)
from watch import wait_at_most

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# inputs and outputs
data_json = ''                 # LLaVA-Instruct JSON: [{id, image, conversations}]
image_root = ''                # image paths in it are relative to this folder and stay inside it
align_dir = ''                 # out dir of the A1 run to start from: its connector, its base models, its shapes
text_jsonl = ''                # held-out plain text, {"text": ...} a line: what must not get worse
replay_jsonl = ''              # plain text to train on beside the chats: text ability must not decay; '' for none
replay_share = 0.2             # of the examples, when there is a replay_jsonl
init_from = ''                 # out dir of an A2 run to go on from with a new schedule: its connector and LoRA
out_dir = 'out/a2'
resume = False                 # go on from out_dir/ckpt; without it a folder with a checkpoint is refused
max_bad_samples = 0            # more unusable samples than this end the run; up to it they go to bad_samples.jsonl
allow_failed_gates = False     # True: take an A1 run whose gates failed; train where one will fail by data or settings
# LoRA, on the language model only
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05            # above 0 its masks depend on micro_batch_size and the number of ranks
lora_targets = ''              # a regular expression over full names; '' for every matrix in the decoder's layers
# training
think_block = False            # True: an empty think block before the last answer, as Qwen3's own template has it
max_seq_len = 2048             # longer examples are cut at the end and counted
max_images = 4                 # in a chat, each where its <image> stands; a sample with more is a bad one
micro_batch_size = 16          # examples per rank and micro-batch: memory and speed only, but for the masks of dropout
global_batch_size = 128        # over all ranks and micro-batches: this one is a hyperparameter
learning_rate = 2e-5           # of the connector
lora_learning_rate = 2e-4
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
n_eval = 512                   # held-out items, balanced over short, medium and long ones by their labels
n_golden = 64                  # more held-out items, described or answered at every checkpoint
n_golden_between = 16          # of these, at all checkpoints but the last: generation is most of an evaluation
n_predictions = 256            # eval items described or answered at the end
n_retrieval = 128              # eval items told apart by their loss at the end, 32 at a time; 32 at every checkpoint
n_text = 512                   # texts for the text-only regression
bucket_edges = ()              # the most label tokens of a short and of a medium item; () for thirds of the data
max_new_tokens = 128
# gates
gate_truncated = 0.01          # share of samples that may be cut
gate_text = 0.02               # the text-only loss may rise by this share over the base model's
# each has to hold with 95 % confidence, where it is measured over items
gate_share_removed = 0.20      # of the loss under another image, the share that the right one removes
gate_input_recall = 0.4        # how often the image of answers is found among 32, by the loss; a guess has 0.03
gate_output_recall = 0.25      # how often the answers to an image are
gate_ablation_nats = 0.05      # another image, zeros and noise each cost this much per label
gate_win = 0.8                 # ... and cost more than the right image in this share of the items
gate_distinct = 0.5            # different ones among the answers, as a part of the truths' own share
gate_commonest = 0.1           # the commonest one's share may exceed that of the truths by this ...
gate_malformed = 0.1           # ... and the shares of stammering, empty and cut ones by this
gate_own_truth = 0.05          # how much nearer answers are to their own truth than to others, as F1 of words
# machine
device = 'auto'
dtype = 'auto'                 # of frozen weights: bfloat16 where the device multiplies it; what learns is float32
shard = False                  # True: in training each rank holds a part of the layers' weights; whole in evaluations
gradient_checkpointing = False  # True: layers are computed again on the way back: less memory, up to half more time
feature_cache = ''             # folder for the tower's features, each image once; '' runs the tower every step
feature_cache_gb = 200.0       # where the features would take more than this, the tower runs every step as well
workers = 2                    # threads that decode images
deterministic = False          # True: the same bits on a GPU each time, which is slower; a CPU's always are
log_every = 20
timeout = 30.0                 # minutes that a rank waits for another one after the first step; before it, a day
tensorboard = False            # True: the log's numbers in out_dir/tensorboard too; needs the package tensorboard
config = configure(globals(), required=('data_json', 'image_root', 'align_dir', 'text_jsonl'))
# -----------------------------------------------------------------------------

# settings that cannot be meant end the run before anything is built
require_positive(config, 'max_seq_len', 'micro_batch_size', 'global_batch_size', 'learning_rate', 'grad_clip',
                 'epochs', 'epoch_minutes', 'eval_time_share', 'save_minutes', 'n_eval', 'n_golden', 'n_golden_between',
                 'max_new_tokens', 'log_every', 'workers', 'n_text', 'n_retrieval', 'lora_r', 'lora_alpha',
                 'lora_learning_rate', 'timeout', 'max_images')
require_not_negative(config, 'epoch_samples', 'n_steps', 'eval_every', 'seed', 'weight_decay', 'n_predictions',
                     'feature_cache_gb')
require_split(config)
require_share(config, 'warmup_frac', 'min_lr_frac', 'eval_time_share', 'gate_truncated', 'lora_dropout', 'replay_share')
if replay_share == 1:
    raise SystemExit('replay_share = 1: wanted less, there have to be chats beside the replayed text')

# ranks and the run's folder
rank, world_size, device = init_ranks(device, deterministic)
dtype = frozen_dtype(dtype, device)
out, is_resumed = open_run(out_dir, resume, rank)
stop = StopSignal(save_minutes, is_resumed=is_resumed)
board = tensorboard_writer(tensorboard)

# the aligned model, then the data: items become examples, examples are held out or trained on
gates.require_passed(align_dir, allow_failed_gates)
aligned, align_meta, _ = load_checkpoint(Path(align_dir) / 'ckpt', device)
model_args = align_meta['model']
num_image_tokens = model_args['shape']['num_image_tokens']
tokenizer = load_tokenizer(model_args['llm'])
template = ChatTemplate(tokenizer, num_image_tokens, max_seq_len, think_block)
if rank == 0 and template.difference():
    print(f'{model_args["llm"]}: {template.difference()}')
bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
examples = prepare('chat', data_json, template, bad_samples, rank=rank, image_root=image_root, max_images=max_images)
preprocessing = image_settings(model_args['vision'])
read = image_reading(preprocessing)
if rank == 0:
    choose_split(examples, n_eval, n_golden, bucket_edges, path=out / 'split.json', bad_samples=bad_samples,
                 read=read)
barrier()
train_set, eval_set, golden_set, edges = load_split(examples, out / 'split.json', n_eval)
n_images = [len(example.image_starts) for example in eval_set]
matching = matching_sets(caption_keys(eval_set), n_retrieval, seed, kinds=n_images)
text_set = [template.text(text, where) for where, text in list(text_lines(text_jsonl))[:n_text]]
if replay_jsonl:
    replay = prepare('text', replay_jsonl, template, bad_samples, rank=rank)
    _, n_cut, _ = replay.label_counts()
    if rank == 0 and n_cut:                            # no fault: what is left of them is text as well
        print(f'{n_cut} of {len(replay)} texts to replay are cut at max_seq_len = {max_seq_len}')
    # so many that they are replay_share of the whole, drawn with replacement
    n_replay = round(replay_share / (1 - replay_share) * len(train_set))
    train_set += Chosen((replay, np.random.default_rng(seed).integers(len(replay), size=n_replay)))
label_gates = gates.label_gates(*examples.label_counts(), gate_truncated)
gates.end_doomed(label_gates, allow_failed_gates)
data_seen = on_rank_0(data_fingerprint, examples, out / 'split.json')   # a resume has to see the same
data_seen |= on_rank_0(files_fingerprint, text_jsonl=text_jsonl, replay_jsonl=replay_jsonl)

# model: tower and language model are frozen, connector and LoRA learn
model = load_vlm(**model_args, dtype=dtype, device='cpu' if shard else device)
model.connector.load_state_dict(aligned['connector'])
seed_everything(seed, 'lora')
adapter = lora(model.llm, lora_r, lora_alpha, dropout=lora_dropout, targets=lora_targets)
if gradient_checkpointing:
    checkpoint_layers(model.llm)
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
names = [name for name, _ in model.named_parameters()]
declared = {name for name in names if name.startswith('connector.') or '.lora_' in name}
gates.end_doomed([gates.lora_gate(names), gates.declared_gate(declared, trainable)], allow_failed_gates)
frozen_before = frozen_sha256(model, trainable)
if frozen_before != align_meta['frozen_sha256']:
    raise SystemExit(f'{align_dir} was aligned to other weights than those of {model_args["llm"]} and '
                     f'{model_args["vision"]} today, or in another dtype: restore them, set dtype, or align again')
if shard:                                              # after the hash: from here on each rank has a part
    shard_layers(model.llm, device)
    model.to(device)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
norm_groups = {'connector': 'connector.', 'lora': 'llm.'}   # the log has a gradient norm for each
cache = None
if feature_cache:
    cache = cache_features(feature_cache, model.tower, examples.images(), read=read, device=device,
                           max_gb=feature_cache_gb, rank=rank, world_size=world_size)
loader = Loader(image_reader(read, cache), template.image_length, bad_samples, workers)
sampler = ShuffledSampler(train_set, global_batch_size, seed)
if rank == 0:
    print(f'{len(train_set)} examples to train on, {len(eval_set)} of {n_eval} to evaluate, {len(golden_set)} of '
          f'{n_golden} golden; '
          f'{sum(p.numel() for p in trainable.values()):,} parameters learn')

# optimizer: matrices decay, vectors do not; peak: a group's highest learning rate
peaks = {'connector.': learning_rate, 'llm.': lora_learning_rate}
groups = parameter_groups(trainable, peaks, weight_decay)
# 0.98: the mean square of a gradient is over some 50 steps; over 1,000, as by 0.999, it would lag in so short a run
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
step = first_step = 0
evaluated = False              # whether the log has the evaluation of this step already
with_gradient = set()          # names of what has had a gradient so far: everything trainable has to get there
if is_resumed:
    tensors, meta, used = load_checkpoint(out / 'ckpt', device)
    check_resumable(meta, config, frozen_before, used)
    check_same_data(meta, data_seen, used)
    model.connector.load_state_dict(tensors['connector'])
    set_peft_model_state_dict(adapter, tensors['lora'])
    optimizer.load_state_dict(tensors['optimizer'])
    step = first_step = meta['step']
    epoch_samples = meta['epoch_samples']
    eval_every = meta['eval_every']
    with_gradient = set(meta['with_gradient'])
    evaluated = meta['evaluated']
elif init_from:
    tensors, meta, used = load_checkpoint(Path(init_from) / 'ckpt', device)
    check_same_parts(meta, 'a2', model_args, config, frozen_before, used)
    model.connector.load_state_dict(tensors['connector'])
    set_peft_model_state_dict(adapter, tensors['lora'])


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


def text_loss():
    """Mean loss in nats per label on plain text, without an image."""
    model.eval()
    nats = 0.0
    for part in rank_parts(text_set, micro_batch_size, rank, world_size):
        batch = loader.collate(part)
        with torch.no_grad():
            nats += model(batch.to(device)).item()
    model.train()
    return all_sum(nats) / sum(len(example.label_positions) for example in text_set)


def predict(examples, path):
    """Answer every question of chats, greedily, after the true answers before it, and write one JSON line for each;
    returns (predictions, the first question and answer of each chat). On every rank."""
    # nothing is kept for a backward pass: four times as many fit
    return write_predictions(path, model, loader, template=template, examples=examples,
                             batch_size=4 * micro_batch_size, max_new_tokens=max_new_tokens, rank=rank,
                             world_size=world_size)


def evaluate(at_end):
    """Look at the held-out and the golden items, at the end at all of them: (summed losses of each held-out example
    under each condition, its labels, crossed losses, means for the log, predictions of golden items), on every rank."""
    losses = image_ablation(model, loader, eval_set, micro_batch_size, seed=seed, rank=rank, world_size=world_size)
    counts = np.array([len(example.label_positions) for example in eval_set])
    sets = matching if at_end else matching[:1]
    crossed = crossed_losses(model, loader, eval_set, sets, micro_batch_size, rank=rank, world_size=world_size)
    means = ablation_means(losses, counts, edges, crossed)
    means['text'] = text_loss()
    stop_if_eval_not_finite(step, means, out)
    looked_at = golden_set if at_end else golden_set[:n_golden_between]
    path = out / 'golden' / f'step_{step:06d}.jsonl'
    predictions, captions = predict(looked_at, path)
    means['distinct'] = distinct([p.text for p in predictions])
    if rank == 0:
        contact_sheet(path.with_suffix('.png'), [example.item.images for example in looked_at], captions)
    return losses, counts, crossed, means, predictions


def save(state):
    """out/ckpt and status.json. On every rank."""
    bad_samples.gather()
    if rank == 0 and step > first_step:
        tensors = {'connector': model.connector.state_dict(), 'lora': get_peft_model_state_dict(adapter),
                   'optimizer': optimizer.state_dict()}
        save_checkpoint(out / 'ckpt', tensors, {
            'stage': 'a2', 'model': model_args, 'step': step, 'n_steps': n_steps, 'epoch_samples': epoch_samples,
            'eval_every': eval_every,
            'settings': config, 'frozen_sha256': frozen_before, 'with_gradient': sorted(with_gradient),
            'evaluated': evaluated, 'data': data_seen})
    if rank == 0:
        write_status(out, state, step, n_steps)
    barrier()                                          # nobody leaves, and ends the run, while rank 0 still writes
    stop.saved(step)


# schedule: n_steps, or how many samples an epoch of epoch_minutes holds, with its evaluations, and when these are
if n_steps:
    epoch_samples = round(n_steps * global_batch_size / epochs)
if not epoch_samples or not eval_every:
    first_steps = loader.steps(sampler, 0, N_WARMUP + N_MEASURED, micro_batch_size, rank, world_size)
    n_samples, eval_every = measure_epoch(first_steps, forward_backward, optimizer, epoch_minutes, global_batch_size,
                                          evaluate=evaluate, eval_every=eval_every,
                                          eval_time_share=eval_time_share)
    epoch_samples = epoch_samples or n_samples
n_steps = n_steps or max(1, round(epochs * epoch_samples / global_batch_size))
if rank == 0:
    print(f'{n_steps} steps of {global_batch_size}; repeat exactly with --epoch_samples={epoch_samples} '
          f'--eval_every={eval_every}')

# the loop
log = Log(out / 'log.jsonl', step if is_resumed else None, evaluated, active=rank == 0, writer=board)
if not is_resumed:
    log.write('run', stage='a2', settings=config, n_steps=n_steps, epoch_samples=epoch_samples, world_size=world_size,
              eval_every=eval_every, trainable=sum(p.numel() for p in trainable.values()),
              held_out={'eval': len(eval_set), 'golden': len(golden_set)}, **provenance())
model.train()
meter = Meter()
stop.save = save
progress = Progress(n_steps, 'a2', initial=step, active=rank == 0)
batches_of_steps = loader.steps(sampler, step, n_steps, micro_batch_size, rank, world_size)
while True:
    # evaluate and save; the stop test below makes first and last evaluation ordinary ones
    stopped = stop.before_step()
    is_last = step == n_steps
    is_due = is_last or (step % eval_every == 0 and (eval_first or step > 0))
    if is_due or stopped or stop.save_is_due:
        meter.pause()
        if is_due and not stopped and (is_last or not evaluated):   # a finished run is judged again, and logged once
            losses, counts, crossed, means, predictions = evaluate(at_end=is_last)
            if not evaluated:
                log.write('eval', step=step, **means)
            evaluated = True
            progress.write(f'step {step}: the right image removes {means["share_removed"]:.0%} of the loss, is found '
                           f'among {crossed.shape[-1]} in {means["input_recall_1"]:.0%}; held-out loss '
                           f'{means["correct"]:.4f}, {means["shuffled"]:.4f} another one, {means["zero"]:.4f} zeros, '
                           f'{means["noise"]:.4f} noise; text {means["text"]:.4f}')
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
        log.write('step', step=step, loss=loss, lr=lr * learning_rate, lr_lora=lr * lora_learning_rate,
                  grad_norm=grad_norm, **norms, **window)
        progress.write(f'step {step}/{n_steps}: loss {window["window_loss"]:.4f}, gradient {grad_norm:.3f}, '
                       f'learning rate {lr:.1%} of its peak, {window["samples_per_s"]:.0f} samples/s, '
                       f'{window["data_wait"]:.0%} waiting for data')
progress.close()

# gates
predictions += predict(eval_set[:n_predictions], out / 'predictions.jsonl')[0]
text = means['text']
with adapter.disable_adapter():
    base_text = text_loss()
model.eval()                                           # on every rank: rank 0 judges and exports alone
status = 0
if rank == 0:
    worth = gates.worth(means['share_removed'], crossed, distinct([p.text for p in predictions]))
    removed = share_removed(losses['correct'], losses['shuffled'])
    verdicts = [gates.clears(gates.SHARE_REMOVED, removed, gate_share_removed)]
    verdicts += gates.retrieval_gates(crossed, 'image of its answers', 'answers of its image',
                                      input_bar=gate_input_recall, output_bar=gate_output_recall)
    verdicts += gates.text_gates('answers', predictions, distinct=gate_distinct, commonest=gate_commonest,
                                 malformed=gate_malformed, own_truth=gate_own_truth)
    for condition in 'shuffled', 'zero', 'noise':
        name = f'{condition} image costs more than the right one'
        gate, _ = gates.ablation(name, losses['correct'], losses[condition], counts=counts, bar=gate_ablation_nats,
                                 min_win=gate_win)
        verdicts.append(gate)
    shared = 0.0
    if replay_jsonl:
        replayed = plain_texts(replay[:20_000])       # as many as take a second
        shared = shared_phrases(plain_texts(text_set), replayed)
    verdicts.append(gates.text_gate(text / base_text - 1, gate_text, shared))
    verdicts += label_gates
    verdicts.append(gates.lora_gate(names))
    verdicts += gates.training_gates(declared, trainable, with_gradient, before=frozen_before,
                                     after=frozen_sha256(model, trainable))
    status = gates.conclude(out, verdicts, worth={'': worth}, losses=means,
                            text_loss={'base': base_text, 'tuned': text})
    # after the verdict, which a disk that is full of weights would cost
    adapter.save_pretrained(out / 'adapter')
    connector = {name: p.contiguous() for name, p in model.connector.state_dict().items()}
    save_file(connector, out / 'connector.safetensors')
    write_status(out, 'finished', step, n_steps)
    gates.curves(out / 'log.jsonl', out / 'curves.png')
barrier()                                              # an export may take longer than a rank waits in a step
status = int(all_sum(status))
shutdown_ranks()
sys.exit(status)
