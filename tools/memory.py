"""
How much memory of a GPU a training step takes: a formula over the real shapes, nothing is loaded or downloaded.

reads   nothing for the base models it knows (KNOWN); of another one its config
writes  the parts and their sum, in GiB; with --table_only=True the table of docs/bigger.md
done    at once

$ python -m tools.memory --stage=a1 --llm=Qwen/Qwen3-8B --micro_batch_size=8
$ python -m tools.memory --stage=b4 --llm=Qwen/Qwen3-0.6B --micro_batch_size=8 --example_tokens=1100 --codes=1001
$ python -m tools.memory --table_only=True
"""
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, Qwen3Config, SiglipVisionConfig, SiglipVisionModel)

from configure import configure
from decoders import LOGITS_AT_ONCE, layer_matrices, load_config, tuned_parts
from model import Connector, Tower

KNOWN = {                                              # as published; the text rows are 151,936 in both
    'Qwen/Qwen3-8B': {
        'hidden_size': 4096, 'intermediate_size': 12288, 'num_hidden_layers': 36, 'num_attention_heads': 32,
        'num_key_value_heads': 8, 'head_dim': 128, 'tie_word_embeddings': False, 'vocab_size': 151_936},
    'Qwen/Qwen3-0.6B': {
        'hidden_size': 1024, 'intermediate_size': 3072, 'num_hidden_layers': 28, 'num_attention_heads': 16,
        'num_key_value_heads': 8, 'head_dim': 128, 'tie_word_embeddings': True, 'vocab_size': 151_936},
    'google/siglip2-so400m-patch14-384': {
        'hidden_size': 1152, 'intermediate_size': 4304, 'num_hidden_layers': 27, 'num_attention_heads': 16,
        'image_size': 384, 'patch_size': 14}}
FLOAT = 4                                              # bytes of a number in float32
GIB = 2 ** 30


@dataclass(frozen=True)
class Step:
    """What one GPU works on at a time."""
    micro_batch_size: int = 16
    example_tokens: int = 128      # of one example, image tokens included
    labels: int = 40               # of these, text to predict
    images: int = 1                # of one example, Track A
    codes: int = 0                 # of these, codes to predict
    code_range: int = 0            # ids of the range that a code is one of
    half: bool = True              # frozen weights in bfloat16, else in float32
    cuda: bool = True              # dropout keeps a byte per number there, and a whole number on a CPU
    ranks: int = 1                 # GPUs in all
    checkpointing: bool = False    # gradient_checkpointing
    shard: bool = False            # the layers' matrices in shards over the ranks


@dataclass(frozen=True)
class Trained:
    """The settings of what learns."""
    connector: dict = field(default_factory=dict)      # Track A: arguments of Connector that are not its defaults
    new_rows: int = 0              # Track B: new ids of the token space
    lora_r: int = 16               # A2, and B4 without full_tune
    lora_dropout: float = 0.05
    full_tune: bool = False        # B4


def memory_needed(stage, llm, tower, step, trained):
    """Bytes on one GPU, {part: bytes}; 'peak' is their largest sum. Everything is counted on the meta device.

    stage: a1, a2, b3 or b4. llm, tower: configs of the base models, tower None for Track B. step: a Step. trained: a
    Trained.

    Kept for the backward pass: attention is fused (no T x T matrix), examples are of like length (the micro-batch's
    are), and of a frozen layer only what its own backward needs, no inputs of its matrices.
    """
    parts = build(stage, llm, tower, trained)
    parameters = list(nn.ModuleDict(parts).parameters())
    learned = [p.numel() for p in parameters if p.requires_grad]
    n_learned = sum(learned)
    n_frozen = sum(p.numel() for p in parameters) - n_learned
    number = 2 if step.half else FLOAT                 # bytes of a number in the precision of the frozen weights

    n_tokens = step.micro_batch_size * step.example_tokens
    layer = n_tokens * layer_bytes(stage, llm, step, trained, number)
    # what the last norm norms, and what its weight is multiplied by
    activations = n_tokens * llm.hidden_size * (FLOAT + number if trained.full_tune else FLOAT)
    n_kept = n_learned                                 # of which a cast is kept
    if step.checkpointing:                             # the input of each layer
        activations += n_tokens * llm.num_hidden_layers * llm.hidden_size * number
        n_in_layers = sum(p.numel() for p in parts['llm'].base_model.layers.parameters() if p.requires_grad)
        layer += number * n_in_layers / llm.num_hidden_layers
        n_kept -= n_in_layers
    else:
        activations += llm.num_hidden_layers * layer
    n_sharded = {True: 0, False: 0}                    # numbers of the layers' matrices in shards, by what learns
    if step.shard:
        for p in layer_weights(parts['llm']):
            n_sharded[p.requires_grad] += p.numel()
        if not step.checkpointing:                     # nor is their cast kept: a layer comes whole in that precision
            n_kept -= n_sharded[True]
    if 'connector' in parts:
        activations += step.micro_batch_size * step.images * connector_bytes(parts['connector'], tower, llm, number)
    if step.half:                                      # casts of what is multiplied by, which input rows are not
        activations += number * (n_kept if 'connector' in parts else n_kept - parts['new_rows'][0].numel())
    logits = logits_at_once(llm, step)

    need = {'frozen': number * n_frozen, 'trained': FLOAT * n_learned, 'gradients': FLOAT * n_learned,
            'optimizer': 2 * FLOAT * n_learned,        # the two moments of AdamW
            'activations': activations,
            'logits': FLOAT * sum(logits)}             # log probabilities
    elsewhere = 1 - 1 / step.ranks                     # the share of a shard that other ranks have
    need['frozen'] -= elsewhere * number * n_sharded[False]
    for part, size in ('trained', 1), ('gradients', 1), ('optimizer', 2):
        need[part] -= elsewhere * size * FLOAT * n_sharded[True]
    always = need['frozen'] + need['trained'] + need['gradients'] + need['optimizer']
    # what is whole at a time: in evaluations all layers, in a step two of them and the gradients of one
    whole = number * sum(n_sharded.values())
    two_layers = (2 * whole + FLOAT * n_sharded[True]) / llm.num_hidden_layers
    # a backward pass: gradients of one range's logits at a time, in float32 and, where half, again in bfloat16
    of_logits = max(logits, default=0) * (FLOAT + 2 if step.half else FLOAT)
    # or one layer that is computed again, when those are gone
    again = layer if step.checkpointing else 0
    backward = activations + max(need['logits'] + of_logits, again) + FLOAT * max(learned) + two_layers
    # the end of a step: gradient norms in float64, one matrix at a time; the message between ranks
    end = max(16 * max(learned), FLOAT * (n_learned - n_sharded[True]) if step.ranks > 1 else 0)
    return {**need, 'peak': always + max(backward, end, whole)}


def layer_weights(llm):
    """What sharding.py cuts: the matrices of the layers, without LoRA's."""
    return [p for name, p in llm.base_model.layers.named_parameters() if p.ndim > 1 and 'lora_' not in name]


def build(stage, llm, tower, trained):
    """{part: module} of a stage on the meta device; what learns has requires_grad."""
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(llm).requires_grad_(False)
        parts = {'llm': model}
        if stage in ('a1', 'a2'):
            parts['tower'] = Tower(SiglipVisionModel(tower))
            parts['connector'] = Connector(tower.hidden_size, parts['tower'].side, llm.hidden_size, **trained.connector)
        else:
            new_in, new_out = (nn.Parameter(torch.empty(trained.new_rows, llm.hidden_size)) for _ in range(2))
            parts['new_rows'] = nn.ParameterList([new_in, new_out])
        if has_lora(stage, trained):
            get_peft_model(model, LoraConfig(r=trained.lora_r, target_modules=layer_matrices(model)))
        if trained.full_tune:
            for part in tuned_parts(model).values():
                part.requires_grad_(True)
    return parts


def has_lora(stage, trained):
    return stage == 'a2' or (stage == 'b4' and not trained.full_tune)


def layer_bytes(stage, llm, step, trained, number):
    """Bytes that a layer of the language model keeps of one token."""
    width = llm.hidden_size
    inside = llm.intermediate_size                     # of the MLP
    head = getattr(llm, 'head_dim', None) or width // llm.num_attention_heads
    queries = llm.num_attention_heads * head
    keys = (getattr(llm, 'num_key_value_heads', None) or llm.num_attention_heads) * head
    # what is normed: twice the stream; in Qwen3 queries and keys too, which other decoders have less
    layer = FLOAT * (2 * width + queries + keys)
    layer += number * (2 * queries + 2 * keys)         # attention: queries, its output, keys, values
    layer += number * 3 * inside                       # MLP: gate, up, their product
    inputs = 5 * width + queries + inside              # of its seven matrices, each in a cast or a dropout of its own
    shared = 2 * width + queries + inside              # queries, keys and values have one input, gate and up have one
    if has_lora(stage, trained):
        layer += 7 * trained.lora_r * number
        if trained.lora_dropout > 0:
            layer += inputs * (number + (1 if step.cuda else number))   # and a mask: bytes on a GPU
        else:
            layer += shared * number
    if trained.full_tune:
        layer += number * (inputs + 2 * width + queries + keys)
    return layer


def connector_bytes(connector, tower, llm, number):
    """Bytes that the connector keeps of one image."""
    n_tokens, width = connector.latents.shape
    n_patches = connector.positions.shape[0]
    has_norm = isinstance(connector.vision_ln, nn.LayerNorm)
    patches = n_patches * (number * tower.hidden_size + FLOAT * width)
    if has_norm:
        patches += n_patches * FLOAT * tower.hidden_size
    attended = 3 * number * (n_patches + n_tokens)     # keys, values and what they are made from
    block = width * (attended + n_tokens * (2 * FLOAT + 12 * number))
    projector = n_tokens * (width * (FLOAT + number) + 8 * llm.hidden_size * number)
    return patches + len(connector.blocks) * block + projector


def logits_at_once(llm, step):
    """[numbers]: the logits that exist at a time over the text rows, and over the range of a code."""
    found = []
    for n_labels, n_ids in (step.labels, llm.vocab_size), (step.codes, step.code_range):
        if n_labels:
            found.append(min(step.micro_batch_size * n_labels, LOGITS_AT_ONCE // n_ids) * n_ids)
    return found


# -----------------------------------------------------------------------------
# the table of docs/bigger.md

SMALL = 'Qwen3-0.6B'
LARGE = 'Qwen3-8B'
LORA_64 = Trained(new_rows=32_772, lora_r=64)
FULL_TUNE = Trained(new_rows=32_772, full_tune=True)


def a1_step(micro_batch_size, ranks=1):
    return Step(micro_batch_size, ranks=ranks)


def a2_step(micro_batch_size, ranks=1, **how):
    return Step(micro_batch_size, example_tokens=1024, labels=400, ranks=ranks, **how)


def b_step(micro_batch_size, ranks=1, **how):
    return Step(micro_batch_size, example_tokens=1100, labels=20, codes=1001, code_range=16_384, ranks=ranks, **how)


PLAN = [                                               # GPU, stage, base, step, what learns
    ('24 GiB', 'a1', SMALL, a1_step(32), Trained()),
    ('24 GiB', 'a2', SMALL, a2_step(4), Trained()),
    ('24 GiB', 'b3', SMALL, b_step(8), LORA_64),
    ('24 GiB', 'b4', SMALL, b_step(4), LORA_64),
    ('24 GiB', 'a1', LARGE, a1_step(4), Trained()),
    ('24 GiB', 'a2', LARGE, a2_step(1), Trained()),
    ('139 GiB', 'a1', LARGE, a1_step(64), Trained()),
    ('139 GiB', 'a2', LARGE, a2_step(8), Trained()),
    ('139 GiB', 'b3', LARGE, b_step(16), LORA_64),
    ('139 GiB', 'b4', LARGE, b_step(8), LORA_64),
    ('139 GiB', 'b4, full_tune', SMALL, b_step(16), FULL_TUNE),
    ('8 x 139 GiB', 'a1', LARGE, a1_step(32, ranks=8), Trained()),
    ('8 x 139 GiB', 'a2', LARGE, a2_step(8, ranks=8), Trained()),
    ('8 x 139 GiB', 'b3', LARGE, b_step(16, ranks=8), LORA_64),
    ('8 x 139 GiB', 'b4', LARGE, b_step(8, ranks=8), LORA_64),
    ('8 x 139 GiB', 'b4, full_tune', LARGE, b_step(1, ranks=8), FULL_TUNE),
    ('8 x 80 GiB', 'b4, full_tune, shard', LARGE, b_step(1, ranks=8, shard=True), FULL_TUNE),
    ('8 x 80 GiB', 'b4, full_tune, both', LARGE, b_step(4, ranks=8, shard=True, checkpointing=True), FULL_TUNE),
    ('24 GiB', 'a2, gradient_checkpointing', LARGE, a2_step(1, checkpointing=True), Trained())]


def known_config(name, cls):
    """The config of a base model, by a name in KNOWN, a folder or a name on the hub: of any language model for
    Qwen3Config."""
    if name in KNOWN:
        return cls(**KNOWN[name])
    found = load_config(name)
    if cls is SiglipVisionConfig:
        found = getattr(found, 'vision_config', found)
    is_right = type(found) in MODEL_FOR_CAUSAL_LM_MAPPING if cls is Qwen3Config else isinstance(found, cls)
    if not is_right:
        wanted = 'a language model' if cls is Qwen3Config else f'a {cls.__name__}'
        raise SystemExit(f'{name}: model_type is {found.model_type!r}, wanted that of {wanted}')
    return found


def gib(size):
    return f'{size / GIB:.1f}'


def table():
    """PLAN in Markdown, GiB on one GPU."""
    lines = ['| GPU | stage | base | micro_batch_size x tokens | frozen | learned | for backward | **peak** | |',
             '|---|---|---|---|---|---|---|---|---|']
    tower = known_config('google/siglip2-so400m-patch14-384', SiglipVisionConfig)
    for gpu, stage, base, step, trained in PLAN:
        need = memory_needed(stage[:2], known_config(f'Qwen/{base}', Qwen3Config), tower, step, trained)
        learned = need['trained'] + need['gradients'] + need['optimizer']
        backward = need['activations'] + need['logits']
        has = float(gpu.split()[-2]) * GIB
        fits = need['peak'] * 1.1 + GIB <= has         # a tenth for the allocator, a GiB for CUDA itself
        lines.append(f'| {gpu} | {stage} | {base} | {step.micro_batch_size} x {step.example_tokens} | '
                     f'{gib(need["frozen"])} | {gib(learned)} | {gib(backward)} | **{gib(need["peak"])}** | '
                     f'{"fits" if fits else "**too large**"} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with a config file or --key=value
    stage = 'a1'                   # a1, a2, b3 or b4
    llm = 'Qwen/Qwen3-8B'          # a Hugging Face name or folder; its config is all that is read
    vision = 'google/siglip2-so400m-patch14-384'   # Track A
    micro_batch_size = 8           # examples of a micro-batch on one GPU
    example_tokens = 128           # tokens of an example, image tokens included: that of the longest ones
    labels = 40                    # of these, text to predict
    images = 1                     # of an example (Track A)
    codes = 0                      # of these, codes to predict (Track B)
    code_range = 16_384            # ids of the range that a code is one of
    new_rows = 32_772              # new ids of the token space
    num_image_tokens = 64
    lora_r = 16
    full_tune = False              # stage B4 without LoRA
    ranks = 1                      # GPUs in all
    gradient_checkpointing = False
    shard = False
    table_only = False
    config = configure(globals())
    # -----------------------------------------------------------------------------
    if stage not in ('a1', 'a2', 'b3', 'b4'):
        raise SystemExit(f'stage = {stage!r}: wanted a1, a2, b3 or b4')
    if full_tune and stage != 'b4':
        raise SystemExit(f'full_tune = True with stage = {stage!r}: only b4 has it')
    if table_only:
        print(table())
        raise SystemExit(0)
    tower = known_config(vision, SiglipVisionConfig) if stage in ('a1', 'a2') else None
    step = Step(micro_batch_size, example_tokens, labels, images=images, codes=codes, code_range=code_range,
                ranks=ranks, checkpointing=gradient_checkpointing, shard=shard)
    trained = Trained({'num_image_tokens': num_image_tokens}, new_rows, lora_r=lora_r, full_tune=full_tune)
    for part, size in memory_needed(stage, known_config(llm, Qwen3Config), tower, step, trained).items():
        print(f'{part:<12} {gib(size):>8} GiB')
