"""
What three choices gain. Not tests: no time is asserted.

labels    one A1 step at Qwen3's vocabulary, logits at label positions against logits at every position
new_rows  one B3 step at Qwen3's vocabulary and 12,352 new ids: new rows beside a base that is only read and the loss
          over each label's range (ours), against full matrices under a gradient mask (mask) and PEFT's TrainableTokens
          (peft), both with the logits of every position
b2        tokenizing the media of a config of stage B2: each alone through the bare codec, each alone through UTI, which
          fills a batch up so that ids never depend on batch mates, and in the batches that build_b2.py makes

Loss and gradients, or ids, are asserted equal first. The variants take turns in one process, and medians are printed;
peak memory is that of a fresh process for each, in MB over what the loaded model takes.

$ python -m tools.bench labels
$ python -m tools.bench new_rows
$ python -m tools.bench b2 configs/b2_small.py
"""
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import TrainableTokensConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from configure import configure
from common import in_parts
from data import collate
from examples import Example
from lists import Item, read_llava
from media import BadSamples, read_audio, read_image
from decoders import NO_MASK
from model import VLM, Connector
from shards import Record, read_manifest, token_example
from token_model import TokenModel
from uti import UTI, Grammar, TokenSpace

TEXT_ROWS = 151_936                                    # of Qwen3
WIDTH = 1024
N_EXAMPLES = 8                                         # of labels: captions
N_LABELS = 24                                          # of each
N_IMAGE_TOKENS = 64
SPACE = TokenSpace(                                    # of new_rows: 4 markers, 8,252 codes of pictures, 4 x 1,024 of
                                                       # sounds: 12,352
    {'name': 'bench', 'text_rows': TEXT_ROWS, 'tokenizer_sha256': '', 'end_of_text': 151_645},
    {'class': '', 'settings': {}, 'sha256': '', 'size': 64, 'grid': (8, 8), 'codes': 8252},
    {'class': '', 'settings': {}, 'sha256': '', 'sample_rate': 16000, 'samples': 16000, 'frames': 16, 'codebooks': 4,
     'codes': 1024})
N_MEDIA = 64                                           # of b2, in each modality

# -----------------------------------------------------------------------------
# measuring


class Trial(NamedTuple):
    """A variant, loaded."""
    loss: Callable                                     # () -> the summed loss of a batch
    trained: list                                      # of parameters
    optimizer: torch.optim.Optimizer | None = None


def step(trial):
    trial.loss().backward()
    if trial.optimizer is not None:
        trial.optimizer.step()
    for p in trial.trained:                            # only these have a gradient
        p.grad = None


def loss_and_gradients(load, variant):
    """(loss, [gradient of each trained parameter])."""
    trial = load(variant)
    loss = trial.loss()
    loss.backward()
    return loss.item(), [p.grad.numpy() for p in trial.trained]


def seconds(functions, n):
    """{name: (n,) times} of functions {name: callable}, which take turns."""
    times = {name: [] for name in functions}
    for _ in range(n):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(of_one) for name, of_one in times.items()}


def seconds_per_step(load, variants, n):
    trials = {variant: load(variant) for variant in variants}
    for trial in trials.values():
        step(trial)                                    # warms up
    return seconds({variant: lambda trial=trial: step(trial) for variant, trial in trials.items()}, n)


def resident(field):
    """VmRSS, or VmHWM, its peak, of this process in MB (Linux)."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024


def peak(load, variant):
    """MB that two steps add to this process at its peak, the optimizer's state included."""
    trial = load(variant)
    Path('/proc/self/clear_refs').write_text('5')      # the peak starts anew, at what is there now
    before = resident('VmRSS')
    for _ in range(2):
        step(trial)
    return resident('VmHWM') - before


def alone(function, *args):
    """In a process of its own, so that nothing stays behind."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def compare(load, ours, others, n, same_as_others):
    """Assert that variants agree, then print what a step of each takes.

    same_as_others: the variant of ours that computes what the others do.
    """
    wanted, gradients = alone(loss_and_gradients, load, same_as_others)
    # the others add up in another order: a gradient may differ by a ten thousandth of the largest one
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for variant in others:
        loss, found = alone(loss_and_gradients, load, variant)
        assert abs(loss - wanted) < 1e-5 * abs(wanted), (variant, loss, wanted)
        for gradient, other in zip(gradients, found, strict=True):
            other = other[-len(gradient):]             # of a full matrix: its new rows, which come last
            assert np.abs(other - gradient).max() < 1e-4 * largest, variant
    times = alone(seconds_per_step, load, (ours, *others), n)
    for variant, spent in times.items():
        print(f'{variant:<16} {np.median(spent):.2f} s a step, {alone(peak, load, variant):.0f} MB more at the peak')
    # a ratio for each turn, then their median: a busy machine slows all the variants of a turn down
    for variant in others:
        print(f'{variant} / {ours}: {np.median(times[variant] / times[ours]):.2f} x the time, turn by turn')


def qwen3(tied):
    """Four layers of Qwen3-0.6B under its whole vocabulary, frozen."""
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=TEXT_ROWS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied))
    llm.set_attn_implementation('unpadded')
    return llm.eval().requires_grad_(False)


def everywhere(llm, batch, **inputs):
    """The loss by every position's logits, all but the labels masked out: what `labels=` does in most code."""
    logits = llm(position_ids=batch.position_ids[None], attention_mask=NO_MASK, use_cache=False,
                 layout=batch.layout, **inputs).logits[0]                                       # (T, V)
    targets = torch.full_like(batch.input_ids, -100).index_copy(0, batch.logit_positions, batch.labels)
    return F.cross_entropy(logits.float(), targets, reduction='sum')


# -----------------------------------------------------------------------------
# labels


def load_labels(variant):
    llm = qwen3(tied=True)                             # seeds; the connector is drawn after it
    vlm = VLM(None, Connector(1152, 27, WIDTH), llm)
    rng = np.random.default_rng(0)
    first = N_IMAGE_TOKENS + 3
    examples = []
    images = []
    for _ in range(N_EXAMPLES):
        ids = rng.integers(0, TEXT_ROWS, first + N_LABELS).astype(np.int32)
        label_positions = np.arange(first, len(ids), dtype=np.int32)
        examples.append(Example(Item('x', ('x.png',), ()), ids, label_positions, np.array([1]), truncated=False))
        images.append([rng.standard_normal((729, 1152)).astype(np.float32)])
    batch = collate(examples, images, N_IMAGE_TOKENS)

    def every_position():                              # the same inputs as in vlm.nll, and then the whole head
        embeds = vlm.embed(batch.input_ids, batch.image_positions, vlm.image_tokens(batch.images))   # (T, D)
        return everywhere(vlm.llm, batch, inputs_embeds=embeds[None])

    loss = every_position if variant == 'every_position' else lambda: vlm(batch)
    return Trial(loss, list(vlm.connector.parameters()))


# -----------------------------------------------------------------------------
# new_rows


def token_batch():
    """One example of each task."""
    grammar = Grammar(SPACE)
    rng = np.random.default_rng(0)
    examples = []
    for task, modality in ('i2t', 'image'), ('a2t', 'audio'), ('t2i', 'image'), ('t2a', 'audio'):
        payload = rng.integers(*grammar.bounds(grammar.payload_ranges[modality]))
        record = Record('', modality, payload, rng.integers(0, TEXT_ROWS, 24), '', {})
        examples.append(token_example(record, task, grammar, max_seq_len=128))
    return collate(examples)


def load_new_rows(variant):
    """Variants: ours; ours with the softmax over everything, as the others have it; mask; peft. The same weights."""
    llm = qwen3(tied=False)
    torch.manual_seed(1)
    model = TokenModel(llm, SPACE, typed_head=variant == 'ours')
    batch = token_batch()
    # a loss is summed over all labels in every variant; what differs is where logits exist, and what gets a gradient
    if variant in ('ours', 'ours_all_logits'):
        trained = [model.new_in, model.new_out]
        loss = lambda: model(batch)
    else:
        widen(llm.model.embed_tokens, model.new_in)
        widen(llm.lm_head, model.new_out)
        trained = under_mask(llm) if variant == 'mask' else under_peft(llm)
        loss = lambda: everywhere(llm, batch, input_ids=batch.input_ids[None])
    return Trial(loss, trained, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0))


def widen(module, new):
    module.weight = torch.nn.Parameter(torch.cat([module.weight, new.detach()]), requires_grad=False)   # (V + new, D)


def under_mask(llm):
    # the whole matrices get a gradient, and AdamW keeps two moments of them: the mask comes after that
    trained = [llm.model.embed_tokens.weight, llm.lm_head.weight]
    for p in trained:
        p.requires_grad_(True)
        p.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:TEXT_ROWS]), grad[TEXT_ROWS:]]))
    return trained


def under_peft(llm):
    new = list(range(TEXT_ROWS, SPACE.total))
    config = TrainableTokensConfig(token_indices=new, target_modules=['embed_tokens', 'lm_head'], task_type='CAUSAL_LM')
    get_peft_model(llm, config)                        # changes llm itself
    return [p for p in llm.parameters() if p.requires_grad]


# -----------------------------------------------------------------------------
# b2


def settings_of(script, arguments):
    """A script's settings after config files and --key=value: its lines above configure(), and then configure()."""
    # nothing but imports and literals stands there, so running it does no work
    source = Path(script).read_text()
    namespace = {'__file__': script}
    exec(source[:source.index('config = configure(')], namespace)
    return configure(namespace, arguments)


@torch.no_grad()
def bare_images(uti, images):
    """ids (N, codes), one at a time, nothing filled up and nothing checked."""
    codes = [uti.image_codec.to_codes(torch.from_numpy(image)[None] / 127.5 - 1) for image in images]
    return torch.cat(codes).numpy() + uti.space['image'].first


@torch.no_grad()
def bare_sounds(uti, waves):
    codes = []
    for wave in waves:
        clip = np.pad(wave, (0, uti.space.audio['samples'] - len(wave)))
        codes.append(uti.audio_codec.to_codes(torch.from_numpy(clip)[None]))                    # (1, K, F)
    return (torch.cat(codes).transpose(1, 2).numpy() + uti.book_starts).reshape(len(waves), -1)   # (N, F K)


def through_uti(encode, media, batch_size):
    return np.concatenate([encode(part)[0] for part in in_parts(media, batch_size)])            # (N, codes)


def compare_encoders(modality, bare, encode, media, batch_size, n):
    """Assert that the ids are the same, then print what each way to them takes."""
    variants = {
        'bare codec, one at a time': lambda: bare(media),
        'UTI, one at a time': lambda: through_uti(encode, media, 1),
        f'UTI, {batch_size} at a time': lambda: through_uti(encode, media, batch_size)}
    wanted, *others = [ids_of() for ids_of in variants.values()]
    assert all(np.array_equal(wanted, other) for other in others), modality
    times = seconds(variants, n)
    for name, spent in times.items():
        ratio = np.median(times['bare codec, one at a time'] / spent)
        print(f'{modality}: {name:<26} {len(media) / np.median(spent):8.1f} a second, {ratio:.2f}x')


def bench_b2(arguments, n=7):
    settings = settings_of('build_b2.py', arguments)
    audit_dir = settings['audit_dir']
    space = TokenSpace.load(Path(audit_dir) / 'token_space.json')
    uti = UTI.of_space(space, audit_dir, settings['llm'], settings['image_codec'], settings['audio_codec'],
                       image_prefix=settings['image_prefix'], audio_prefix=settings['audio_prefix'])
    bad_samples = BadSamples('bad.jsonl', 0, active=False)   # not active: writes no file
    items = read_llava(settings['data_json'], settings['image_root'], bad_samples, captions=True)
    images = [read_image(item.images[0], space.image['size']) for item in items[:N_MEDIA]]
    sounds = {media.path: None for media in read_manifest(settings['manifests'][0], bad_samples)}   # each file once
    waves = []
    for path in list(sounds)[:N_MEDIA]:
        waves.append(read_audio(path, space.audio['sample_rate'], space.audio['samples']))
    print(f'{N_MEDIA} media, {n} rounds, {torch.get_num_threads()} thread(s)')
    batch_size = settings['batch_size']
    compare_encoders('image', partial(bare_images, uti), uti.encode_image, images, batch_size, n)
    compare_encoders('audio', partial(bare_sounds, uti), uti.encode_audio, waves, batch_size, n)


if __name__ == '__main__':
    which = sys.argv[1] if len(sys.argv) > 1 else ''
    if which == 'labels':
        compare(load_labels, 'label_positions', ['every_position'], n=5, same_as_others='label_positions')
    elif which == 'new_rows':
        compare(load_new_rows, 'ours', ['mask', 'peft'], n=3, same_as_others='ours_all_logits')
    elif which == 'b2':
        bench_b2(sys.argv[2:])
    else:
        raise SystemExit(__doc__.strip())
